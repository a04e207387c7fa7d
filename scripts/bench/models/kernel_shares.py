"""What a step of a model spends its time on: matrix products, attention, and the rest, which is
what fusing can win.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from common.execution import synchronize
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Names of cuBLAS, cuDNN, CUTLASS, FlashAttention and Inductor kernels, and of PyTorch's CPU
# operators.
ATTENTION = re.compile(r"flash|fmha|sdpa|attention|mha_", re.IGNORECASE)
MATMUL = re.compile(
    r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|triton_tem_|conv(olution|2d|3d|nd)|::(add|b|baddb)?mm$|mkldnn", re.IGNORECASE
)


# PyTorch's templates around the function that an elementwise kernel computes, and what it calls
# such functions.
WRAPPER = re.compile(
    r"(elementwise_kernel|ReduceOp|gpu_kernel_impl|launch_|[AB]?UnaryFunctor$|BinaryFunctor$|TensorIterator|opmath_|func_wrapper)"
)
DECORATION = re.compile(r"^CUDAFunctor(OnSelf)?_|(_kernel_cuda|_kernel_impl|_cuda_kernel|Functor|_functor|Ops|_kernel)$")


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step; an operator on the CPU."""

    name: str
    launches: int
    ms: float


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
    """``"attention"``, ``"matmul"`` or ``"other"``, from the name of a kernel or of a CPU
    operator.
    """
    if ATTENTION.search(kernel):
        return "attention"
    return "matmul" if MATMUL.search(kernel) else "other"


def readable(kernel: str) -> str:
    """A short name: of PyTorch's elementwise kernels what they compute, of others the function
    without types.
    """
    if kernel.startswith("Mem"):
        return kernel.split(" (")[0]
    if kernel.startswith("triton_"):
        return re.sub(r"_\d+$", "", kernel)
    if kernel.startswith("void at::native::"):
        names = [
            name
            for name in re.findall(r"at::native::(?:\(anonymous namespace\)::|\w+_internal::)?(\w+)", kernel)
            if not WRAPPER.search(name)
        ]
        if names:
            return " ".join(dict.fromkeys(DECORATION.sub("", name) for name in names[:2]))
    if kernel.startswith(("void ", "ditnorm::")):
        function = re.split(r"[<(]", kernel.removeprefix("void ").replace("(anonymous namespace)::", ""))[0]
        return function if function.startswith("ditnorm::") else function.split("::")[-1]
    return kernel


def costs(kernels: Iterable[Kernel]) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of what is neither matmul nor attention, by readable name."""
    found: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        if kind(kernel.name) == "other":
            launches, ms = found.get(readable(kernel.name), (0, 0.0))
            found[readable(kernel.name)] = (launches + kernel.launches, ms + kernel.ms)
    return found


def profiled(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Profiles one step."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize()
    return [
        Kernel(event.key, event.count, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000)
        for event in profiler.key_averages()
        if (event.device_type == DeviceType.CUDA) == cuda and not event.is_user_annotation
    ]


def shares(kernels: Iterable[Kernel]) -> Shares:
    """What the kernels of a step add up to."""
    spent = {"attention": 0.0, "matmul": 0.0, "other": 0.0}
    launches = 0
    for kernel in kernels:
        spent[kind(kernel.name)] += kernel.ms
        launches += kernel.launches * (not kernel.name.startswith(("Memcpy", "Memset")))
    return Shares(launches, sum(spent.values()), spent["matmul"], spent["attention"])
