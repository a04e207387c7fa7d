"""Compares real models patched, without and with precomputed modulations: latents of whole
schedules, steps, memory, and making the table.

    python scripts/bench_modulation.py [--models NAME ...] [--layers N] [--steps N] [--out DIR]

Random weights, all layers, one process. Two generations: --steps steps, then another prompt with 4
steps fewer. Then a table of 50 steps is made, and once more. Writes DIR/modulation.json. The exit
status is 1 where latents differ, a step is slower by more than the noise of 1 %, or making the
table takes more memory than a step does. It needs a GPU that the models fit in.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench.models.catalogue import MODELS
from bench.models.real_model import RealModel
from common.command import as_command
from common.execution import free, synchronize
from common.tables import environment, environment_line, text_table
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import ditnorm
from ditnorm.patching.restoring import tables

NAMES = ["qwen-image", "hunyuan-video-480p", "hunyuan-video-1.5", "sd3.5-large"]
FEWER = 4
TABLE_STEPS = 50
NOISE = 1.01


@dataclass(frozen=True)
class Found:
    """One model, measured."""

    layers: dict[str, int]
    steps: tuple[int, int]
    identical: tuple[int, int]
    """Of the steps of either generation."""
    patched_ms: float
    precomputed_ms: float
    patched_peak_gb: float
    precomputed_peak_gb: float
    making_peak_gb: float
    """Of a first step, which makes the table."""
    table_s: float
    """Making the rows of 50 steps."""
    again_s: float
    """The same schedule once more."""
    counters: str

    @property
    def holds(self) -> bool:
        faster = self.precomputed_ms <= NOISE * self.patched_ms
        return self.identical == self.steps and faster and self.making_peak_gb <= self.precomputed_peak_gb * 1.001


@dataclass(frozen=True)
class Generation:
    latents: list[Tensor]
    step_ms: float
    first_peak: float
    peak: float
    """Of the steps after the first, in bytes, as the other."""


def schedule(steps: int) -> Tensor:
    return torch.linspace(1000.0, 1000.0 / steps, steps)


@torch.inference_mode()
def generate(model: nn.Module, real: RealModel, device: torch.device, steps: int, prompt: float) -> Generation:
    """``prompt``: what the text's embeddings are multiplied by. The steps after the first run as in
    a pipeline, which doesn't wait for the device between them.
    """
    latents, found = real.noise(device), []
    first_peak, started = 0, 0.0
    for i, t in enumerate(tqdm(schedule(steps).to(device), desc=real.title, leave=False)):
        given: dict[str, Any] = dict(real.arguments(real, latents, t))
        given |= {k: v * prompt for k, v in given.items() if k.startswith(("encoder_hidden", "pooled")) and v.is_floating_point()}
        if i <= 1:
            synchronize()
            first_peak, started = peak(device), time.perf_counter()
        latents = latents - 0.05 * real.velocity(model, given)
        found.append(latents)
    synchronize()
    step_ms = 1000 * (time.perf_counter() - started) / (steps - 1)
    return Generation([latents.cpu() for latents in found], step_ms, first_peak, peak(device))


def peak(device: torch.device) -> int:
    """The most memory in use since the last call, in bytes."""
    if device.type != "cuda":
        return 0
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def measure(real: RealModel, layers: dict[str, int], device: torch.device, steps: int) -> Found:
    model = ditnorm.patch_model(real.build(layers, device), strict=True)
    both = (steps, max(2, steps - FEWER))
    generate(model, real, device, 2, 1.0)  # what PyTorch does once
    patched = [generate(model, real, device, n, prompt) for n, prompt in zip(both, (1.0, 0.5), strict=True)]
    precomputed = []
    for n, prompt in zip(both, (1.0, 0.5), strict=True):
        ditnorm.precompute_modulation(model, timesteps=schedule(n))
        precomputed.append(generate(model, real, device, n, prompt))
    (table,) = tables(model)
    new = 0.97 * schedule(TABLE_STEPS)  # begins with a timestep that has no row
    ditnorm.precompute_modulation(model, timesteps=new)
    spent = [table.seconds]
    for _ in range(2):
        given = real.arguments(real, real.noise(device), new[0].to(device))
        with torch.inference_mode():
            real.velocity(model, {k: v * 0.25 if k.startswith("pooled") else v for k, v in given.items()})
        spent.append(table.seconds)
    pairs = list(zip(patched, precomputed, strict=True))
    return Found(
        layers,
        both,
        tuple(sum(torch.equal(a, b) for a, b in zip(p.latents, q.latents, strict=True)) for p, q in pairs),  # type: ignore[arg-type]
        patched[0].step_ms,
        precomputed[0].step_ms,
        patched[0].peak / 1e9,
        precomputed[0].peak / 1e9,
        max(q.first_peak for q in precomputed) / 1e9,
        spent[1] - spent[0],
        spent[2] - spent[1],
        str(table),
    )


def text(found: dict[str, Found]) -> str:
    rows = [
        ["model", "equal steps", "patched ms", "precomputed ms", "", "peak GB", "", "saved", "making GB", "table s", "again s", "holds"]
    ]
    for name, f in found.items():
        rows.append(
            [
                name,
                " + ".join(f"{a}/{b}" for a, b in zip(f.identical, f.steps, strict=True)),
                f"{f.patched_ms:.1f}",
                f"{f.precomputed_ms:.1f}",
                f"{f.precomputed_ms / f.patched_ms - 1:+.1%}",
                f"{f.patched_peak_gb:.2f}",
                f"{f.precomputed_peak_gb:.2f}",
                f"{f.patched_peak_gb - f.precomputed_peak_gb:.2f}",
                f"{f.making_peak_gb:.2f}",
                f"{f.table_s:.3f}",
                f"{f.again_s:.3f}",
                "yes" if f.holds else "NO",
            ]
        )
    return text_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare patched models without and with precomputed modulations.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=NAMES, metavar="NAME", help=f"(default: {', '.join(NAMES)})")
    parser.add_argument("--layers", type=int, metavar="N", help="so many blocks of each kind (default: all)")
    parser.add_argument("--steps", type=int, default=20, help="of the first generation (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Found] = {}
    for name in options.models:
        real = MODELS[name]
        layers = {kind: real.config[kind] for kind in real.measured} if options.layers is None else real.layers(options.layers)
        found[name] = measure(real, layers, device, options.steps)
        free()
        print(f"{name}: {found[name].counters}", flush=True)
    command = as_command("scripts/bench_modulation.py", sys.argv[1:] if argv is None else argv)
    where = {"command": command, "date": date.today().isoformat(), "environment": environment(device)}
    document = where | {"models": {name: asdict(f) | {"holds": f.holds} for name, f in found.items()}}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "modulation.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{environment_line(device)}\n\n{text(found)}")
    return int(not all(f.holds for f in found.values()))


if __name__ == "__main__":
    sys.exit(main())
