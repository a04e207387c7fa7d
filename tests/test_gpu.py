"""What only a GPU shows: streams, graphs, sizes past 2^31, devices, processes and threads."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import OPS, Shape, activation, exact, modulation, rounded_once
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import norm_scale_shift, scale_residual, scale_residual_norm_scale_shift

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent


def site(tokens: int = 512, width: int = 3072) -> dict[str, Tensor]:
    shape = Shape(2, tokens, width)
    call = {name: activation("contiguous", shape, torch.bfloat16) for name in ("residual", "x")}
    return call | {name: modulation("chunk", shape, torch.bfloat16) for name in ("gate", "scale", "shift")}


def fresh_process(code: str) -> str:
    """Runs Python code in a process that has never used CUDA, and returns what it prints."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compiled_kernels_serve_cuda() -> None:
    before = kernels.counts()
    for op, function in OPS.items():
        call: dict[str, Any] = site(4)
        function(**{name: t for name, t in call.items() if name in ("x", *_names(op))})
    assert kernels.unavailable is None
    assert {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]} == {(op, "cuda"): 1 for op in OPS}


def _names(op: str) -> tuple[str, ...]:
    return {"norm_scale_shift": ("scale", "shift"), "scale_residual": ("residual", "gate")}.get(op, ("residual", "gate", "scale", "shift"))


@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_the_current_stream_orders_the_call(rounding: str) -> None:
    # A kernel on another stream than the current one would read x before the slow work ahead of it
    # has written it.
    call = site()
    expected = scale_residual_norm_scale_shift(**call, rounding=rounding)
    late = {name: torch.zeros_like(t) for name, t in call.items()}
    slow = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow = slow @ slow * 1e-3
        for name, t in late.items():
            t.copy_(call[name])
        y, r = scale_residual_norm_scale_shift(**late, rounding=rounding)
    stream.synchronize()
    assert torch.equal(y, expected[0])
    assert torch.equal(r, expected[1])


def test_two_streams_at_once() -> None:
    calls = [site(tokens) for tokens in (700, 333)]
    expected = [scale_residual_norm_scale_shift(**call, rounding="eager") for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Any]] = [[], []]
    for _ in range(50):
        for call, stream, into in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                into.append(scale_residual_norm_scale_shift(**call, rounding="eager"))
    torch.cuda.synchronize()
    for into, (y, r) in zip(results, expected, strict=True):
        assert all(torch.equal(a, y) and torch.equal(b, r) for a, b in into)


def test_graph_capture_by_the_first_call_of_a_process() -> None:
    printed = fresh_process("""
        import torch, ditnorm
        from ditnorm.functional import norm_scale_shift, scale_residual, scale_residual_norm_scale_shift
        x, residual, gate, scale, shift = (torch.randn(1, s, 3072, device="cuda").bfloat16() for s in (64, 64, 1, 1, 1))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift)
            z = scale_residual(r, norm_scale_shift(y, scale, shift), gate)
        for _ in range(2):
            x.normal_(), residual.normal_()
            graph.replay()
            wanted_y, wanted_r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift)
            wanted_z = scale_residual(wanted_r, norm_scale_shift(wanted_y, scale, shift), gate)
            assert torch.equal(y, wanted_y) and torch.equal(r, wanted_r) and torch.equal(z, wanted_z)
        assert ditnorm.kernels.unavailable is None
        print("captured")
    """)
    assert printed.strip() == "captured"


def test_a_child_forked_after_the_import_can_use_cuda() -> None:
    printed = fresh_process("""
        import os, torch, ditnorm
        from ditnorm.functional import norm_scale_shift
        assert not torch.cuda.is_initialized()
        child = os.fork()
        if child == 0:
            x = torch.randn(1, 4, 64, device="cuda")
            assert norm_scale_shift(x).isfinite().all()
            print("child", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert norm_scale_shift(torch.randn(1, 4, 64, device="cuda")).isfinite().all()
        print("parent")
    """)
    assert printed.split() == ["child", "parent"]


def test_the_first_call_may_come_from_many_threads() -> None:
    printed = fresh_process("""
        import threading, torch, ditnorm
        from ditnorm.functional import norm_scale_shift
        x = torch.randn(2, 8, 3072, device="cuda")
        barrier, results = threading.Barrier(16), []
        def work():
            barrier.wait()
            results.append(norm_scale_shift(x))
        threads = [threading.Thread(target=work) for _ in range(16)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert len(results) == 16 and all(torch.equal(r, results[0]) for r in results)
        counts = ditnorm.kernels.counts()
        print(counts["norm_scale_shift", "cuda"], counts["norm_scale_shift", "reference"])
    """)
    assert printed.split() == ["16", "0"]


@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_compiled_with_inductor_for_changing_sequence_lengths(rounding: str) -> None:
    def block(residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y, r = scale_residual_norm_scale_shift(residual, x * 2, gate, scale, shift, rounding=rounding)
        return scale_residual(r, F.relu(y), gate, rounding=rounding)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True)
    for tokens in (128, 77, 500):
        call = site(tokens, 1536)
        assert torch.equal(compiled(**call), block(**call))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("width", [3072, 8, 1])
@pytest.mark.parametrize("op", OPS)
def test_more_than_2_to_the_31_elements(op: str, width: int) -> None:
    rows = 2**31 // width + 5
    needed = rows * width * 2 * (2 if op == "norm_scale_shift" else 4)
    if needed > 0.9 * torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    last = 64
    x = torch.zeros(1, rows, width, dtype=torch.bfloat16, device="cuda")
    x[:, -last:] = torch.randn(1, last, width, device="cuda").bfloat16()
    call: dict[str, Any] = {"x": x, "rounding": "single"} | {
        name: torch.randn(width, device="cuda") for name in _names(op) if name != "residual"
    }
    if op != "norm_scale_shift":
        call["residual"] = x
    outputs = OPS[op](**call)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    small = call | {name: call[name][:, -last:].clone() for name in ("x", "residual") if name in call}
    expected = OPS[op](**small)
    for output, wanted in zip(outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert torch.equal(output[:, -last:], wanted)
        constant = output[:, : rows - last]  # rows of zeros: the shift, or zero
        assert torch.equal(constant[:, -1], constant[:, 0])


def test_strides_past_2_to_the_31() -> None:
    wide = torch.empty(3, 2**30 + 64, dtype=torch.bfloat16, device="cuda")
    x = wide[:, None, 8 : 8 + 3072]
    x.copy_(torch.randn(3, 1, 3072, device="cuda"))
    assert torch.equal(norm_scale_shift(x), norm_scale_shift(x.clone()))
    assert torch.equal(norm_scale_shift(x.clone(), scale=x), norm_scale_shift(x.clone(), scale=x.clone()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    on_current = site(16)
    call = {name: t.to("cuda:1") for name, t in on_current.items()}
    results = scale_residual_norm_scale_shift(**call)
    assert {t.device for t in results} == {torch.device("cuda:1")}
    # Compared on the current device: on another one PyTorch 2.11 computes half an ulp to be
    # nothing.
    y, r = (t.to("cuda:0") for t in results)
    expected_y, expected_r = exact(on_current | {"norm": "layer", "eps": 1e-6}, r)
    assert expected_y is not None
    assert expected_r is not None
    rounded_once(y, expected_y)
    rounded_once(r, expected_r)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="scale: expected the device of x, cuda:1, got cuda:0"):
        scale_residual_norm_scale_shift(**(call | {"scale": call["scale"].to("cuda:0")}))


def test_nothing_waits_for_the_gpu() -> None:
    call = site()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rounding in ("single", "eager"):
            scale_residual_norm_scale_shift(**call, rounding=rounding)
            index = torch.zeros(512, dtype=torch.int64, device="cuda")
            norm_scale_shift(call["x"], call["scale"], index=index, rounding=rounding)
    finally:
        torch.cuda.set_sync_debug_mode("default")
