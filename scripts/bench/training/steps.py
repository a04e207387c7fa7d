"""Times training steps of a model in every variant: forward, loss, backward, optimiser."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common.execution import synchronize
from torch import Tensor, nn

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
    """Median wall time of a later step."""
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
    """
    model = real.build(layers, device)
    trained = plan.prepare(model)
    before = [p.detach().to("cpu", copy=True) for p in trained]
    columns = {}
    for variant in variants:
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
        with variant.applied(model):
            columns[variant.name] = _column(model, trained, real, device).json()
    return columns


def _column(model: nn.Module, trained: list[Tensor], real: RealModel, device: torch.device) -> Column:
    step = _step(model, trained, real, device)
    seconds: list[float] = []
    losses: list[float] = []

    def timed() -> float:
        synchronize()
        start = time.perf_counter()
        loss = step()
        synchronize()
        seconds.append(time.perf_counter() - start)
        return loss.item()

    losses = [timed(), timed()]
    first, _ = seconds
    seconds.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    while len(seconds) < TIMED_STEPS or (sum(seconds) < TIMED_SECONDS and len(seconds) < MOST_STEPS):
        timed()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    kernels = profiled(step, device)
    for p in trained:
        p.grad = None
    return Column(first, statistics.median(seconds) * 1000, peak, losses, shares(kernels), costs(kernels))


def _step(model: nn.Module, trained: list[Tensor], real: RealModel, device: torch.device) -> Callable[[], Tensor]:
    """A step of AdamW towards a fixed target; each call makes another."""
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=device.type == "cuda")
    noise = real.noise(device)
    arguments = real.arguments(real, noise, torch.tensor(500.0, device=device))
    # Others may have made the inputs in inference mode, which autograd can't save.
    arguments = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    target = torch.randn(noise.shape, generator=torch.Generator(device).manual_seed(2), device=device)

    def step() -> Tensor:
        velocity = real.velocity(model, arguments)
        loss = nn.functional.mse_loss(velocity.float(), target.view(velocity.shape))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
