"""Times training steps of a model in every variant: forward, loss, backward, optimiser."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common.execution import synchronize
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..models.kernel_shares import Shares, costs, profiled, shares
from ..models.real_model import RealModel
from ..models.variants import Variant
from .plans import Plan

TIMED_STEPS, TIMED_SECONDS, MOST_STEPS = 3, 2.0, 12  # at least so many and so long, after the first two
RATE = 1e-5


@dataclass(frozen=True)
class Column:
    """One variant of a plan, measured."""

    first_step_s: float
    """With what PyTorch and the compiler do once."""
    step_ms: float
    """Median wall time of a later step, in the faster of the passes."""
    host_ms: float
    """Median of when Python had come to its end: where it is near the wall time the GPU waited."""
    peak_gb: float | None
    """Largest memory allocated on the GPU in a later step, weights included, 1e9 bytes; None on the
    CPU.
    """
    losses: Sequence[float]
    """Of the first two steps."""
    shares: Shares
    costs: Mapping[str, tuple[int, float]]
    """Launches and milliseconds of a step outside matmul and attention, by the kernel's name."""

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"other_share": self.shares.other}


def measure(
    real: RealModel, layers: Mapping[str, int], plan: Plan, device: torch.device, variants: Sequence[Variant]
) -> dict[str, dict[str, Any]]:
    """Builds one model, prepares it as ``plan`` says and measures its variants, each from the same
    weights.

    Those that needn't be compiled are timed again after all others: the first minute of a process
    is slower than the rest.
    """
    model = real.build(layers, device)
    trained = plan.prepare(model)
    before = [p.detach().to("cpu", copy=True) for p in trained]
    columns: dict[str, Column] = {}
    passes = [*variants, *(variant for variant in variants if not variant.compiled)]
    for variant in (progress := tqdm(passes, unit="pass", leave=False)):
        progress.set_description(f"{real.title}, {plan.name}, {variant.name}")
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
        if variant.compiled:
            # Starts the compiler: no model's first step is to wait for that.
            torch.compile(torch.neg)(torch.ones(8, device=device))
        with variant.applied(model):
            first = columns.get(variant.name)
            again = _column(model, trained, real, device)
            columns[variant.name] = again if first is None else _faster(first, again)
        progress.write(f"{progress.desc}{again.step_ms:.1f} ms, the first step {again.first_step_s:.1f} s")
    return {name: column.json() for name, column in columns.items()}


def _faster(first: Column, again: Column) -> Column:
    """The faster of two passes, with the first one's first step and losses."""
    return replace(min(first, again, key=lambda column: column.step_ms), first_step_s=first.first_step_s, losses=first.losses)


def _column(model: nn.Module, trained: list[Tensor], real: RealModel, device: torch.device) -> Column:
    step = _step(model, trained, real, device)
    seconds: list[tuple[float, float]] = []  # until Python returned, until the GPU had done all

    def timed() -> float:
        synchronize()
        start = time.perf_counter()
        loss = step()
        returned = time.perf_counter()
        synchronize()
        seconds.append((returned - start, time.perf_counter() - start))
        return loss.item()

    losses = [timed(), timed()]
    first, _ = seconds
    seconds.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while len(seconds) < TIMED_STEPS or (sum(wall for _, wall in seconds) < TIMED_SECONDS and len(seconds) < MOST_STEPS):
        timed()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    kernels = profiled(step, device)
    for p in trained:
        p.grad = None
    host, wall = (statistics.median(column) * 1000 for column in zip(*seconds, strict=True))
    return Column(first[1], wall, host, peak, losses, shares(kernels), costs(kernels))


def _step(model: nn.Module, trained: list[Tensor], real: RealModel, device: torch.device) -> Callable[[], Tensor]:
    """A step of AdamW towards a fixed target; each call makes another."""
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=device.type == "cuda")
    loss = loss_of(model, real, device)

    def step() -> Tensor:
        result = loss()
        optimizer.zero_grad()
        result.backward()
        optimizer.step()
        return result.detach()

    return step


def loss_of(model: nn.Module, real: RealModel, device: torch.device) -> Callable[[], Tensor]:
    """The distance of a velocity from a fixed target."""
    noise = real.noise(device)
    arguments = real.arguments(real, noise, torch.tensor(500.0, device=device))
    # Others may have made the inputs in inference mode, which autograd can't save.
    arguments = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    target = torch.randn(noise.shape, generator=torch.Generator(device).manual_seed(2), device=device)

    def loss() -> Tensor:
        velocity = real.velocity(model, arguments)
        return nn.functional.mse_loss(velocity.float(), target.view(velocity.shape))

    return loss
