"""GPUs that the compiled kernels don't run on, beside ones that they do."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from support.cases import MODE

from ditnorm import kernels


class Gpu:
    """Stands for a tensor on a GPU."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process before its first CUDA call, on a machine with GPU 0, which the library doesn't
    serve, and GPU 1: those that were asked.
    """
    devices: list[int] = []

    def register(file: object, path: str, device: int) -> str | None:
        devices.append(device)
        if device == 0:
            return "_C.so does not run on this GPU"
        monkeypatch.setattr(kernels, "library", kernels.FILE)
        return None

    state: dict[str, object] = {"unavailable": None, "library": None, "_refused": {}, "_register": register}
    for name, value in state.items():
        monkeypatch.setattr(kernels, name, value)
    return devices


def test_the_gpu_of_the_tensors_is_asked_not_the_current_one(asked: list[int]) -> None:
    assert kernels._compiled_serves(Gpu(1))  # type: ignore[arg-type]
    assert asked == [1]


def test_a_gpu_that_is_refused_leaves_the_others_their_kernels(asked: list[int]) -> None:
    with pytest.warns(RuntimeWarning, match="slower PyTorch path: _C.so does not run on this GPU"):
        assert not kernels._compiled_serves(Gpu(0))  # type: ignore[arg-type]
    assert not kernels._compiled_serves(Gpu(0))  # type: ignore[arg-type]  # without a second warning
    assert kernels._compiled_serves(Gpu(1))  # type: ignore[arg-type]
    assert asked == [0, 1]
    assert kernels.unavailable is None
    assert kernels.unavailable_on(torch.device("cuda", 0)) == "_C.so does not run on this GPU"
    assert kernels.unavailable_on(torch.device("cuda", 1)) is None


@pytest.mark.skipif(MODE != "cpu_sim", reason="needs a host build of the kernels")
def test_a_device_that_the_kernels_do_not_run_on_gets_pytorchs_operations() -> None:
    code = """
        import torch
        from ditnorm import kernels
        from ditnorm.kernels.compiled import opened
        from ditnorm.functional import joint_qk_norm_rope, norm_scale_shift, qk_norm_rope, scale_residual, scale_residual_norm_scale_shift

        def calls():
            torch.manual_seed(0)
            x, residual, scale, weight = torch.randn(2, 6, 64), torch.randn(2, 6, 64), torch.randn(2, 64), torch.randn(64)
            index, rows = torch.tensor([0, 1, 1, 0, 2, 0]), torch.randn(3, 64)
            q, k, v = qkv = torch.randn(3, 2, 6, 64).unbind(0)
            none = (None, None, None)
            return [
                norm_scale_shift(x, scale, norm="rms", weight=weight, rounding="eager"),
                norm_scale_shift(x, scale=rows, index=index),
                *scale_residual_norm_scale_shift(residual, x, scale, scale, scale, weight=weight),
                scale_residual(residual, x, scale),
                *qk_norm_rope(q, k, *none, head_dim=32),
                *joint_qk_norm_rope(*qkv, *none, *qkv, *none, head_dim=32, encoder_first=True),
            ]

        expected = calls()
        before = kernels.counts()
        library = opened(kernels.FILE)
        assert library.ditnorm_unusable(-1) == b"no such GPU"
        assert library.ditnorm_register() == 0
        assert all(torch.equal(a, b) for a, b in zip(calls(), expected, strict=True))
        assert all(library.ditnorm_calls(op.encode()) == 0 for op in kernels.OPS)
        assert {op: n - before[op, path] for (op, path), n in kernels.counts().items() if n != before[op, path]} == {
            "norm_scale_shift": 2,
            "scale_residual_norm_scale_shift": 1,
            "scale_residual": 1,
            "qk_norm_rope": 1,
            "joint_qk_norm_rope": 1,
        }
    """
    environment = os.environ | {"DITNORM_KERNELS": "0", "CPU_SIM_UNUSABLE": "no such GPU"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
