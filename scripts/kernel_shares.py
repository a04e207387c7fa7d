"""What a step of a model spends its time on: matrix products, attention, and the rest, which is what fusing can win."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from generation import synchronize
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Names of cuBLAS, cuDNN, CUTLASS, FlashAttention and Inductor kernels, and of PyTorch's CPU operators.
ATTENTION = re.compile(r"flash|fmha|sdpa|attention|mha_", re.IGNORECASE)
MATMUL = re.compile(
    r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|triton_tem_|conv(olution|2d|3d|nd)|::(add|b|baddb)?mm$|mkldnn", re.IGNORECASE
)


@dataclass(frozen=True)
class Shares:
    """Of one step. ``busy_ms``: the sum over kernels, or over operators on the CPU."""

    kernels: int
    busy_ms: float
    matmul_ms: float
    attention_ms: float

    @property
    def other(self) -> float:
        """The share outside matmul and attention, 0 to 1."""
        return 1 - (self.matmul_ms + self.attention_ms) / self.busy_ms


def kind(kernel: str) -> str:
    """``"attention"``, ``"matmul"`` or ``"other"``, from the name of a kernel or of a CPU operator."""
    if ATTENTION.search(kernel):
        return "attention"
    return "matmul" if MATMUL.search(kernel) else "other"


def measure(step: Callable[[], object], device: torch.device) -> Shares:
    """Profiles one step."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize()
    kernels, busy, matmul, attention = 0, 0.0, 0.0, 0.0
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) != cuda or event.is_user_annotation:
            continue
        milliseconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
        busy += milliseconds
        kernels += event.count * (not event.key.startswith(("Memcpy", "Memset")))
        attention += milliseconds * (kind(event.key) == "attention")
        matmul += milliseconds * (kind(event.key) == "matmul")
    return Shares(kernels, busy, matmul, attention)
