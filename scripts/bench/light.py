"""The speed of light of a cell: the fastest plain streaming kernel (``streaming.cu``) that moves
the same bytes in the same mix.
"""

import ctypes
from functools import partial
from pathlib import Path

import build_kernels
import torch

from .contestants import Call
from .timing import measure, record

SOURCE = Path(__file__).with_name("streaming.cu")
LIBRARY = build_kernels.ROOT / "build" / "streaming.so"
FINALISTS = 2  # of all variants, timed again in the cell's own rotation
TRIAL_REPLAYS = 5


def build() -> Path:
    """Compiles the kernels for this machine's GPU unless that has been done; raises BuildError
    where it can't.
    """
    inputs = (SOURCE, Path(build_kernels.__file__))
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return LIBRARY
    nvcc = build_kernels.find_nvcc()
    if nvcc is None:
        raise build_kernels.BuildError("the speed of light needs nvcc: in DITNORM_NVCC, CUDA_HOME, PATH or /usr/local/cuda")
    LIBRARY.parent.mkdir(exist_ok=True)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in build_kernels.target_archs()]
    flags = ["-std=c++17", "-O3", f"-ccbin={build_kernels.cxx()}", "-Xcompiler=-fPIC", "-shared", "--threads=0"]
    build_kernels.run("compile streaming.cu", [nvcc, *flags, *targets, SOURCE, "-o", LIBRARY])
    return LIBRARY


class Light:
    """The streaming kernels, and which of them are fastest for each mix and size."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()))
        self._library.stream_variant_name.restype = ctypes.c_char_p
        self._library.stream_error.restype = ctypes.c_char_p
        self._library.stream_launch.argtypes = [ctypes.c_int] * 3 + [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_void_p]
        names = [self._library.stream_variant_name(i) for i in range(self._library.stream_variants())]
        self.variants = [name.decode() for name in names]
        self._finalists: dict[tuple[int, int, int], list[int]] = {}

    def finalists(self, streams: tuple[int, int, int], sets: int, calls: int) -> dict[str, list[Call]]:
        """The fastest variants for ``(reads, writes, bytes of a stream)``: a list of calls, one for
        each set of tensors, by name.
        """
        reads, writes, size = streams
        data = torch.randint(-(1 << 31), 1 << 31, (sets, reads + writes, size // 4), dtype=torch.int32, device="cuda")
        if streams not in self._finalists:
            recordings = {str(i): record(self._calls(i, reads, data), calls) for i in range(len(self.variants))}
            times = measure(recordings, TRIAL_REPLAYS)
            self._finalists[streams] = sorted(range(len(self.variants)), key=lambda i: times[str(i)].median)[:FINALISTS]
        return {self.variants[i]: self._calls(i, reads, data) for i in self._finalists[streams]}

    def _calls(self, variant: int, reads: int, data: torch.Tensor) -> list[Call]:
        return [partial(self._launch, variant, tensors[:reads], tensors[reads:]) for tensors in data]

    def _launch(self, variant: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        ins = (ctypes.c_void_p * len(inputs))(*(t.data_ptr() for t in inputs))
        outs = (ctypes.c_void_p * len(outputs))(*(t.data_ptr() for t in outputs))
        words = inputs[0].numel() * inputs.itemsize // 16
        stream = torch.cuda.current_stream().cuda_stream
        code = self._library.stream_launch(variant, len(inputs), len(outputs), ins, outs, words, stream)
        if code:
            raise RuntimeError(f"streaming kernel {self.variants[variant]}: {self._library.stream_error(code).decode()}")
