"""Times whole denoising steps of real models with random weights: eager, patched with either
rounding, compiled, and patched + compiled.

    python scripts/bench_transformers.py [--models NAME ...] [--layers N] [--quick] [--profile]
                                         [--accuracy] [--out DIR]
    python scripts/bench_transformers.py --quantization NAME ...

With --quantization the weights are quantised: float8-row, float8-tensor or int8-row.

Everything runs in one process with the same weights and inputs. The latents after each of the first
steps are compared, too: those of patched must equal those of eager bit for bit. With --accuracy,
the error of one step against float32 is measured: that of rounding="single" must be no larger than
that of eager, but by chance. Writes DIR/transformers.json and DIR/transformers.png. The exit status
is 1 if a model failed or one of these doesn't hold. Real sizes need a GPU: 45 GB of its memory for
all models.
"""

import argparse
import itertools
import json
import shlex
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench.models import accuracy, report, steps
from bench.models.catalogue import MODELS
from bench.models.real_model import RealModel
from bench.models.variants import EAGER, PATCHED, VARIANTS
from common.execution import free
from common.quantization import QUANTIZATIONS
from common.tables import environment, environment_line

PROFILED = (EAGER.name, PATCHED.name)


def result(real: RealModel, quantization: str | None, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one model; an error becomes part of the result, since the other models are still
    worth measuring.
    """
    layers = real.layers(options.layers)
    entry: dict[str, Any] = {
        "title": real.title if quantization is None else f"{real.title}, {quantization}",
        "source": real.source,
        "tokens": real.tokens,
        "layers": layers,
        "all_layers": {kind: real.config[kind] for kind in layers},
    }
    if quantization is not None:
        entry["quantization"] = quantization
    try:
        chosen = [variant for variant in VARIANTS if variant.quick or not options.quick]
        found = steps.measure(real, layers, device, chosen, quantization)
        entry |= found.json()
        if options.profile:
            entry["costs"] = {name: found.columns[name].costs for name in PROFILED}
        if options.accuracy:
            free()
            measured = [variant for variant in VARIANTS if variant.accuracy and not (options.quick and variant.compiled)]
            entry["accuracy"] = accuracy.measure(real, layers, device, measured)
    except torch.OutOfMemoryError as error:
        entry["error"] = f"out of GPU memory ({str(error).splitlines()[0]}); fewer layers: --layers N"
    except Exception as error:
        traceback.print_exc()
        entry["error"] = f"{type(error).__name__}: {error}"
    free()
    return entry


def failed(entry: Mapping[str, Any]) -> bool:
    """Whether a model couldn't be measured, or what is promised doesn't hold for it."""
    if "error" in entry or any(column.get("steps_identical", steps.COMPARED) < steps.COMPARED for column in entry["columns"].values()):
        return True
    return "accuracy" in entry and not accuracy.holds(entry["accuracy"])


def chosen(options: argparse.Namespace) -> list[str]:
    """The arguments that make a difference to what is measured."""
    models = [] if options.models == list(MODELS) else ["--models", *options.models]
    models += [] if options.quantization == [None] else ["--quantization", *options.quantization]
    layers = [] if options.layers is None else ["--layers", str(options.layers)]
    return models + layers + [f"--{name}" for name in ("quick", "profile", "accuracy") if getattr(options, name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Time whole denoising steps of real models with random weights.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--quantization",
        nargs="+",
        choices=QUANTIZATIONS,
        default=[None],
        metavar="NAME",
        help=f"torchao's, of the linear layers of the blocks: {', '.join(QUANTIZATIONS)}",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="so many blocks of each kind (default: what fits; the table says how many)")
    parser.add_argument("--quick", action="store_true", help="eager and patched only")
    parser.add_argument("--profile", action="store_true", help="list the kernels outside matmul and attention, eager and patched")
    parser.add_argument("--accuracy", action="store_true", help='measure how far one step is from float32, rounding="single" too')
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    if options.layers is not None and options.layers < 1:
        parser.error("--layers: at least 1")
    if options.accuracy and options.quantization != [None]:
        parser.error("--accuracy: of models that aren't quantised")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries: dict[str, dict[str, Any]] = {}
    if not options.quick:
        # Starts the compiler: no model's first step is to wait for that.
        torch.compile(torch.neg)(torch.ones(8, device=device))
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/bench_transformers.py", *chosen(options)])
    document = {"command": command, "date": date.today().isoformat(), "environment": environment(device), "models": entries}
    for name, quantization in itertools.product(options.models, options.quantization):
        start = time.perf_counter()
        key = name if quantization is None else f"{name}, {quantization}"
        entry = entries[key] = result(MODELS[name], quantization, device, options)
        # A run cut short keeps what it has.
        (options.out / "transformers.json").write_text(json.dumps(document, indent=1) + "\n")
        outcome = entry.get("error") or report.bits(entry, PATCHED.name)
        print(f"{entry['title']}: {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"\n{environment_line(device)}\n\n{report.table(entries)}\n\n{report.notes(entries)}")
    if options.quantization != [None]:
        print(f"\n{report.gain_table(entries)}")
    for entry in entries.values():
        if "costs" in entry:
            print(f"\n{entry['title']}\n{report.profile_table(entry)}")
    if measured := {name: entry for name, entry in entries.items() if "accuracy" in entry}:
        print(f"\n{accuracy.table(measured)}")
    if any("error" not in entry for entry in entries.values()):
        report.chart(entries.values(), options.out / "transformers.png", environment_line(device))
    print(f"\nwritten to {options.out}")
    return int(any(failed(entry) for entry in entries.values()))


if __name__ == "__main__":
    sys.exit(main())
