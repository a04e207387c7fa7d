"""Times whole denoising steps of real models with random weights: eager, patched with either rounding, compiled, and patched + compiled.

    python scripts/bench_transformers.py [--models NAME ...] [--layers N] [--quick] [--profile] [--accuracy] [--out DIR]

Everything runs in one process with the same weights and inputs. Also compared: the latents after each of the first steps, patched against
eager, which must be bit-identical. With --accuracy, also the error of one step against float32, where rounding="single" must be no
further off than eager, but by chance. Writes DIR/transformers.json and DIR/transformers.png. The exit status is 1 if a model failed or
one of these doesn't hold. Real sizes need a GPU: 45 GB of its memory for all models.
"""

import argparse
import contextlib
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import accuracy
import matplotlib
import torch
from generation import compile_blocks, forget_compiled, synchronize
from kernel_shares import Shares, costs, measure, shares
from real_models import MODELS, RealModel
from tables import environment, environment_line, text_table
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import ditnorm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = ("eager", "patched", "patched, single", "compiled", "patched + compiled")
COMPARED = 3  # denoising steps whose latents are compared
TIMED_STEPS, TIMED_SECONDS = 2, 2.0  # at least, after the first
MOST_STEPS = 12
PROFILED_SHARE = 0.01  # of a step's time, that a kernel must cost for --profile to list it


@dataclass(frozen=True)
class Column:
    """One way of running a model."""

    first_step_s: float
    """With what PyTorch and the compiler do once."""
    step_ms: float
    """Median wall time of a later step."""
    steps: int
    """How many were timed."""
    peak_gb: float | None
    """Largest memory allocated on the GPU, weights included, 1e9 bytes; None on the CPU."""
    shares: Shares
    costs: Mapping[str, tuple[int, float]]
    """Launches and milliseconds of a step outside matmul and attention, by the name of the kernel."""

    def json(self) -> dict[str, Any]:
        fields = asdict(self) | {"other_share": self.shares.other}
        del fields["costs"]
        return fields


@dataclass(frozen=True)
class Measured:
    """One model, measured in every column."""

    columns: Mapping[str, Column]
    identical: int
    """Denoising steps, of the compared ones, after which the patched latents equal those of eager bit for bit."""
    reproducible: bool
    """Whether eager itself gives the same bits again; looked at only where patched differs."""


def denoise(model: nn.Module, real: RealModel, device: torch.device) -> Iterator[Tensor]:
    """Euler steps from noise, without end; yields the latents after each. The velocity is scaled down so that latents stay finite."""
    latents = real.noise(device)
    for index in range(1000):
        timestep = torch.tensor(1000.0 - index, device=device)
        with torch.inference_mode():
            latents = latents - 0.05 * real.velocity(model, real.arguments(real, latents, timestep))
        yield latents


def run(model: nn.Module, real: RealModel, device: torch.device, on_step: Callable[[], object]) -> tuple[Column, list[Tensor]]:
    """Times the steps of one column; also returns the latents of the first steps, on the CPU."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = denoise(model, real, device)
    seconds: list[float] = []
    latents: list[Tensor] = []
    while len(seconds) <= TIMED_STEPS or (sum(seconds[1:]) < TIMED_SECONDS and len(seconds) < MOST_STEPS):
        synchronize()
        start = time.perf_counter()
        result = next(steps)
        synchronize()
        seconds.append(time.perf_counter() - start)
        if len(latents) < COMPARED:
            latents.append(result.cpu())
        on_step()
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    kernels = measure(lambda: next(steps), device)
    step_ms = statistics.median(seconds[1:]) * 1000
    return Column(seconds[0], step_ms, len(seconds) - 1, peak, shares(kernels), costs(kernels)), latents


def compare(real: RealModel, layers: Mapping[str, int], device: torch.device, names: Sequence[str]) -> Measured:
    """Builds one model and measures the columns ``names``."""
    model = real.build(layers, device)
    columns: dict[str, Column] = {}
    with tqdm(desc=real.title, unit="step", leave=False) as progress:

        def measured(name: str) -> list[Tensor]:
            progress.set_description(f"{real.title}, {name}")
            columns[name], latents = run(model, real, device, progress.update)
            return latents

        def measured_compiled(name: str) -> None:
            with empty_cache():
                compile_blocks(model)
                measured(name)
                forget_compiled(model)

        eager = measured("eager")
        ditnorm.patch_model(model, strict=True)
        patched = measured("patched")
        if "patched, single" in names:
            ditnorm.patch_model(model, strict=True, rounding="single")
            measured("patched, single")
        ditnorm.unpatch_model(model)
        same = [torch.equal(a, b) for a, b in zip(eager, patched, strict=True)]
        again = eager if all(same) else [step.cpu() for step, _ in zip(denoise(model, real, device), range(COMPARED), strict=False)]
        if "compiled" in names:
            measured_compiled("compiled")
            ditnorm.patch_model(model, strict=True)
            measured_compiled("patched + compiled")
    if not all(step.isfinite().all() for step in eager):
        raise RuntimeError("the latents of the unpatched model aren't finite: nothing was compared")
    return Measured(columns, sum(same), all(torch.equal(a, b) for a, b in zip(eager, again, strict=True)))


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Lets Inductor find nothing compiled before: the first step shows the whole wait."""
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        yield


def result(
    real: RealModel, layers: Mapping[str, int], device: torch.device, names: Sequence[str], *, profile: bool, accurate: bool
) -> dict[str, Any]:
    """Measures one model; an error becomes part of the result. With ``profile`` the costs of the kernels do, too, and with ``accurate``
    what :func:`accuracy.measure` finds.
    """
    entry: dict[str, Any] = {
        "title": real.title,
        "source": real.source,
        "tokens": real.tokens,
        "layers": dict(layers),
        "all_layers": {kind: real.config[kind] for kind in layers},
    }
    try:
        found = compare(real, layers, device, names)
        entry |= {
            "columns": {name: column.json() for name, column in found.columns.items()},
            "steps_compared": COMPARED,
            "steps_identical": found.identical,
            "eager_reproducible": found.reproducible,
        }
        if profile:
            entry["costs"] = {name: found.columns[name].costs for name in COLUMNS[:2]}
        if accurate:
            free(device)
            entry["accuracy"] = accuracy.measure(real, layers, device, compiled="compiled" in names)
    except torch.OutOfMemoryError as error:
        entry["error"] = f"out of GPU memory ({str(error).splitlines()[0]}); fewer layers: --layers N"
    except Exception as error:  # the other models are still worth measuring
        traceback.print_exc()
        entry["error"] = f"{type(error).__name__}: {error}"
    free(device)
    return entry


def free(device: torch.device) -> None:
    """Gives back the memory of models that are no longer in use."""
    torch.compiler.reset()  # what was compiled holds on to its model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failed(entry: Mapping[str, Any]) -> bool:
    if "error" in entry or entry["steps_identical"] < entry["steps_compared"]:
        return True
    return "accuracy" in entry and not accuracy.holds(entry["accuracy"])


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text."""
    rows = [["model", "layers", "", "step ms", "vs eager", "GPU ms", "first step s", "kernels", "peak GB", "other", "bits"]]
    for entry in entries.values():
        if "error" in entry:
            continue
        eager = entry["columns"]["eager"]["step_ms"]
        for index, (name, column) in enumerate(entry["columns"].items()):
            shares = column["shares"]
            rows.append(
                [
                    entry["title"] if index == 0 else "",
                    layer_counts(entry) if index == 0 else "",
                    name,
                    f"{column['step_ms']:.1f}",
                    "" if index == 0 else f"{column['step_ms'] / eager - 1:+.1%}",
                    f"{shares['busy_ms']:.1f}",
                    f"{column['first_step_s']:.1f}",
                    str(shares["kernels"]),
                    "" if column["peak_gb"] is None else f"{column['peak_gb']:.2f}",
                    f"{column['other_share']:.1%}",
                    bits(entry) if name == "patched" else "",
                ]
            )
    errors = [f"{entry['title']}: {entry['error']}" for entry in entries.values() if "error" in entry]
    return "\n".join([text_table(rows), *errors])


def layer_counts(entry: Mapping[str, Any]) -> str:
    """Measured layers of all."""
    return " + ".join(f"{n}/{entry['all_layers'][kind]}" for kind, n in entry["layers"].items())


def bits(entry: Mapping[str, Any]) -> str:
    """What the comparison of patched with eager found."""
    counts = f"{entry['steps_identical']} of {entry['steps_compared']} steps equal"
    return counts if entry["eager_reproducible"] else f"{counts}; eager itself isn't reproducible"


def profile_table(entry: Mapping[str, Any]) -> str:
    """What costs more than a hundredth of a step's GPU time outside matmul and attention, eager and patched side by side."""
    names = COLUMNS[:2]
    busy = {name: entry["columns"][name]["shares"]["busy_ms"] for name in names}
    found = {name: dict(entry["costs"][name]) for name in names}
    for name in names:
        found[name]["all of these and smaller ones"] = tuple(map(sum, zip((0, 0.0), *found[name].values(), strict=True)))
    kernels = dict.fromkeys(kernel for name in names for kernel in found[name])
    largest = {kernel: max(found[name].get(kernel, (0, 0.0))[1] / busy[name] for name in names) for kernel in kernels}
    rows = [["outside matmul and attention", *(f"{name} {column}" for name in names for column in ("launches", "ms", "share"))]]
    for kernel in sorted((kernel for kernel in kernels if largest[kernel] > PROFILED_SHARE), key=lambda kernel: -largest[kernel]):
        cells = [found[name].get(kernel) for name in names]
        rows.append(
            [kernel]
            + [
                text
                for name, cell in zip(names, cells, strict=True)
                for text in (("", "", "") if cell is None else (str(cell[0]), f"{cell[1]:.2f}", f"{cell[1] / busy[name]:.1%}"))
            ]
        )
    return text_table(rows)


NOTES = """step ms: median wall time of one denoising step; GPU ms: sum over its kernels; first step: with the compiler's work.
kernels: launched in one step; other: share of GPU time outside matmul and attention; bits: latents of patched against eager.
patched, single: with rounding="single", which isn't bit-identical, but nearer to float32 or as near."""


def chart(entries: Mapping[str, Mapping[str, Any]], path: Path, device: str) -> None:
    """Bars: time of a step of each model in each column, eager = 100 %."""
    good = [entry for entry in entries.values() if "error" not in entry]
    names = list(good[0]["columns"])
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.9 * len(good)), layout="constrained")
    height = 0.8 / len(names)
    for offset, name in enumerate(names):
        values = [100 * entry["columns"][name]["step_ms"] / entry["columns"]["eager"]["step_ms"] for entry in good]
        places = [index + offset * height for index in range(len(good))]
        bars = axes.barh(places, values, height * 0.92, label=name, color=COLORS[name])
        texts = [f"{value:.0f} %   {entry['columns'][name]['step_ms']:,.0f} ms" for value, entry in zip(values, good, strict=True)]
        axes.bar_label(bars, texts, padding=3, fontsize=8)
    axes.set_yticks(
        [index + 0.4 - height / 2 for index in range(len(good))], [f"{entry['title']}\n{layer_counts(entry)} layers" for entry in good]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(axes.get_xlim()[1] / 1.05, 100))
    axes.set(xlabel="time of one denoising step, eager = 100 %", title=device)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


COLORS = {"eager": "#9aa0a6", "patched": "#1a73e8", "patched, single": "#8ab4f8", "compiled": "#f2a600", "patched + compiled": "#137333"}


def chosen(options: argparse.Namespace) -> list[str]:
    """The arguments that make a difference to what is measured."""
    models = [] if options.models == list(MODELS) else ["--models", *options.models]
    layers = [] if options.layers is None else ["--layers", str(options.layers)]
    return models + layers + [f"--{name}" for name in ("quick", "profile", "accuracy") if getattr(options, name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Time whole denoising steps of real models with random weights.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, metavar="N", help="so many blocks of each kind (default: what fits; the table says how many)")
    parser.add_argument("--quick", action="store_true", help="eager and patched only")
    parser.add_argument("--profile", action="store_true", help="list the kernels outside matmul and attention, eager and patched")
    parser.add_argument("--accuracy", action="store_true", help='measure how far one step is from float32, rounding="single" too')
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    if options.layers is not None and options.layers < 1:
        parser.error("--layers: at least 1")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = COLUMNS[:2] if options.quick else COLUMNS
    entries: dict[str, dict[str, Any]] = {}
    if not options.quick:
        torch.compile(torch.neg)(torch.ones(8, device=device))  # starts the compiler: no model's first step is to wait for that
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/bench_transformers.py", *chosen(options)])
    report = {"command": command, "date": date.today().isoformat(), "environment": environment(device), "models": entries}
    for name in options.models:
        real = MODELS[name]
        start = time.perf_counter()
        layers = real.layers(options.layers)
        entries[name] = result(real, layers, device, names, profile=options.profile, accurate=options.accuracy)
        (options.out / "transformers.json").write_text(json.dumps(report, indent=1) + "\n")  # a run cut short keeps what it has
        print(f"{real.title}: {entries[name].get('error') or bits(entries[name])} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"\n{environment_line(device)}\n\n{table(entries)}\n\n{NOTES}")
    for entry in entries.values():
        if "costs" in entry:
            print(f"\n{entry['title']}\n{profile_table(entry)}")
    if accurate := {name: entry for name, entry in entries.items() if "accuracy" in entry}:
        print(f"\n{accuracy.table(accurate)}")
    if any("error" not in entry for entry in entries.values()):
        chart(entries, options.out / "transformers.png", environment_line(device))
    print(f"\nwritten to {options.out}")
    return int(any(failed(entry) for entry in entries.values()))


if __name__ == "__main__":
    sys.exit(main())
