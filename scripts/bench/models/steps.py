"""Times the denoising steps of a model in every variant, and compares their latents with those of
eager.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from common.execution import synchronize
from common.quantization import quantize
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ditnorm.patching.restoring import tables as modulation_tables

from .kernel_shares import Shares, costs, profiled, shares
from .real_model import RealModel
from .variants import BF16, EAGER, Variant

COMPARED = 3  # denoising steps whose latents are compared
TIMED_STEPS, TIMED_SECONDS = 2, 2.0  # at least, after the first
MOST_STEPS = 12


@dataclass(frozen=True)
class Column:
    """One variant of a model, measured."""

    first_step_s: float
    """With what PyTorch and the compiler do once."""
    step_ms: float
    """Median wall time of a later step."""
    steps: int
    """How many were timed."""
    peak_gb: float | None
    """Largest memory allocated on the GPU, weights included, 1e9 bytes; None on the CPU."""
    table_s: float | None
    """What making the table of precomputed modulations took, inside the first step; None where
    there is none.
    """
    shares: Shares
    costs: Mapping[str, tuple[int, float]]
    """Launches and milliseconds of a step outside matmul and attention, by the name of the
    kernel.
    """
    latents: Sequence[Tensor]
    """After each of the compared steps, on the CPU."""

    def json(self) -> dict[str, Any]:
        return {
            "first_step_s": self.first_step_s,
            "step_ms": self.step_ms,
            "steps": self.steps,
            "peak_gb": self.peak_gb,
            "table_s": self.table_s,
            "shares": asdict(self.shares),
            "other_share": self.shares.other,
        }


@dataclass(frozen=True)
class Measured:
    """One model, measured in every variant."""

    columns: Mapping[str, Column]
    identical: Mapping[str, int]
    """Of the variants that must have the bits of eager: compared steps after which the
    latents do.
    """
    reproducible: bool
    """Whether eager itself gives the same bits again; looked at only where a variant differs."""

    def json(self) -> dict[str, Any]:
        columns = {name: column.json() for name, column in self.columns.items()}
        for name, steps in self.identical.items():
            columns[name]["steps_identical"] = steps
        return {"columns": columns, "steps_compared": COMPARED, "eager_reproducible": self.reproducible}


def measure(
    real: RealModel, layers: Mapping[str, int], device: torch.device, variants: Sequence[Variant], quantization: str | None = None
) -> Measured:
    """Builds one model and measures its variants, eager first; quantised, if it is to be, and
    patched before that, too.
    """
    model = real.build(layers, device)
    columns: dict[str, Column] = {}
    with tqdm(desc=real.title, unit="step", leave=False) as progress:

        def measured(variant: Variant) -> Column:
            progress.set_description(f"{real.title}, {variant.name}")
            with variant.applied(model):
                column = _column(model, real, device, progress.update)
            progress.write(f"{real.title}, {variant.name}: {column.step_ms:.1f} ms, the first step {column.first_step_s:.1f} s")
            return column

        plain = {}
        if quantization is not None:
            plain[BF16.name] = measured(BF16)
            quantize(model, quantization)
        columns |= {variant.name: measured(variant) for variant in variants if variant.serves(model)} | plain
    eager = columns[EAGER.name].latents
    if not all(step.isfinite().all() for step in eager):
        raise RuntimeError("the latents of the unpatched model aren't finite: nothing was compared")
    identical = {
        variant.name: _equal(columns[variant.name].latents, eager) for variant in variants if variant.exact and variant.name in columns
    }
    again = (
        eager
        if all(n == COMPARED for n in identical.values())
        else [step.cpu() for step in islice(_denoise(model, real, device), COMPARED)]
    )
    return Measured(columns, identical, _equal(again, eager) == COMPARED)


def _column(model: nn.Module, real: RealModel, device: torch.device, on_step: Callable[[], object]) -> Column:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = _denoise(model, real, device)
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
    tables = [table.seconds for table in modulation_tables(model)]
    table_s = sum(tables) if tables else None
    kernels = profiled(lambda: next(steps), device)
    step_ms = statistics.median(seconds[1:]) * 1000
    return Column(seconds[0], step_ms, len(seconds) - 1, peak, table_s, shares(kernels), costs(kernels), latents)


def _denoise(model: nn.Module, real: RealModel, device: torch.device) -> Iterator[Tensor]:
    """Euler steps from noise, without end; yields the latents after each. The velocity is scaled
    down so that latents stay finite.
    """
    latents = real.noise(device)
    for index in range(1000):
        timestep = torch.tensor(1000.0 - index, device=device)
        with torch.inference_mode():
            latents = latents - 0.05 * real.velocity(model, real.arguments(real, latents, timestep))
        yield latents


def _equal(latents: Sequence[Tensor], others: Sequence[Tensor]) -> int:
    return sum(torch.equal(a, b) for a, b in zip(latents, others, strict=True))
