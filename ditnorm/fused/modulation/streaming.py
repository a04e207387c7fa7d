"""Weights in host memory: what forbids it, how they get there, and how they pass through a device
one module at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .modulating import Modulating, Precomputed

GROUP_OFFLOADED = "group offloading moves the weights in its own order, and keeps those of modulations off the device as it is"


def spread(model: nn.Module) -> str | None:
    """The first parameter that is on several devices (FSDP, tensor parallelism), in words."""
    for name, p in model.named_parameters():
        if hasattr(p, "placements") or type(p).__module__.startswith("torch.distributed"):
            return f"{name} is spread over several devices ({type(p).__name__})"
    return None


def uncounted(module: nn.Module) -> str | None:
    """The first parameter of which nobody counts changes, in words."""
    for name, p in module.named_parameters():
        if p.is_inference():
            return f"{name} was made in inference mode, where PyTorch doesn't count what is written to it, and can't be swapped outside"
    return None


def send_home(module: Modulating) -> None:
    """Brings the weights of a module to host memory, pinned where CUDA is in use."""
    for p in module.modulation_weights():
        if p.device.type != "meta":
            p.data = _home(p.data)


def _home(t: Tensor) -> Tensor:
    if not torch.cuda.is_initialized():
        return t.cpu()
    if t.device.type == "cpu" and t.is_pinned():
        return t
    try:
        home = torch.empty_like(t, device="cpu", pin_memory=True)
    except RuntimeError:  # no more memory can be pinned; copies out of this take longer
        return t.cpu()
    return home.copy_(t)


def streamed(modules: Sequence[Precomputed], device: torch.device) -> Iterator[Precomputed]:
    """Each of ``modules`` in turn with its weights on ``device``, those of the next one on their
    way. They are at home afterwards.
    """
    if device.type == "cpu":
        yield from modules
        return
    weights = [[p for p in item.module.modulation_weights() if p.device.type == "cpu"] for item in modules]
    if device.type != "cuda":
        for item, parameters in zip(modules, weights, strict=True):
            with _replaced(parameters, [p.data.to(device) for p in parameters]):
                yield item
        return
    copying, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    size = max(sum(_aligned(p.nbytes) for p in parameters) for parameters in weights)
    buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    copying.wait_stream(current)  # what used this memory before may still run

    def fetch(i: int) -> tuple[list[Tensor], torch.cuda.Event]:
        views, offset = [], 0
        with torch.cuda.stream(copying):
            for p in weights[i]:
                view = buffers[i % 2][offset : offset + p.nbytes].view(p.dtype).view(p.shape)
                views.append(view.copy_(p.data, non_blocking=True))
                offset += _aligned(p.nbytes)
        return views, copying.record_event()

    arriving = fetch(0)
    read: torch.cuda.Event | None = None
    for i, item in enumerate(modules):
        views, arrived = arriving
        if i + 1 < len(modules):
            if read is not None:
                copying.wait_event(read)  # until the module before this one has read its buffer
            arriving = fetch(i + 1)
        current.wait_event(arrived)
        with _replaced(weights[i], views):
            yield item
        read = current.record_event()


@contextmanager
def _replaced(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """``values`` in the places of ``parameters`` for as long as it lasts."""
    homes = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, home in zip(parameters, homes, strict=True):
            p.data = home


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 512) * 512  # as PyTorch's allocator aligns, which cuBLAS's choice of kernel may depend on
