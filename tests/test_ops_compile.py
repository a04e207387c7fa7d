"""The ops under PyTorch's compilers: one opaque call each, no graph break, dynamic shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import DEVICE, MODE, MODULATIONS, OPS, Shape, activation, modulation, selection
from torch import Tensor, nn

from ditnorm import kernels

BACKEND = "inductor" if MODE == "cuda" else "aot_eager"
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # there is no autograd formula on the op: functional has it


def arguments(op: str, tokens: int = 6, indexed: bool = False) -> dict[str, Any]:
    shape = Shape(2, tokens, 64)
    call: dict[str, Any] = {"x": activation("row_stride", shape, torch.bfloat16)}
    if op != "norm_scale_shift":
        call["residual"] = activation("channel_strided", shape, torch.bfloat16)
    for name in MODULATIONS[op]:
        call[name] = modulation("rows_chunk" if indexed else "chunk", shape, torch.bfloat16)
        call[f"{name}_table"] = torch.randn(64, device=DEVICE)
    if indexed:
        call["index"] = selection("int32", shape)
    return call


@pytest.mark.parametrize("rounding", [0, 1])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, indexed: bool, rounding: int) -> None:
    call = arguments(op, indexed=indexed)
    residual = [] if op == "norm_scale_shift" else [call["residual"]]
    modulations = [call[name] for name in MODULATIONS[op]]
    tables = [call[f"{name}_table"] for name in MODULATIONS[op]]
    affine, norm = ([], []) if op == "scale_residual" else ([torch.randn(64, device=DEVICE), None], [0, 1e-6])
    flat = (*residual, call["x"], *modulations, *affine, *tables, call.get("index"), *norm, rounding)
    torch.library.opcheck(getattr(kernels.ops, op).default, flat, test_utils=CHECKS)


def compiled_calls(function: Callable[..., Any], calls: list[dict[str, Any]], dynamic: bool | None) -> int:
    """Runs every call compiled, compares with plain runs, and returns how many graphs were made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, backend=BACKEND, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(compiled(**call), function(**call), rtol=0, atol=0)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_sequence_lengths_share_one_dynamic_graph(op: str, rounding: str) -> None:
    function = OPS[op]
    calls = [arguments(op, tokens) | {"rounding": rounding} for tokens in (6, 8, 11, 30)]
    assert compiled_calls(function, calls, dynamic=True) == 1
    assert compiled_calls(function, calls, dynamic=None) == 2  # the first length, then any


@pytest.mark.parametrize("kind", ["sample", "token", "frame", "rows"])
@pytest.mark.parametrize("op", OPS)
def test_sizes_that_are_fixed_in_some_arguments_and_dynamic_in_others(op: str, kind: str) -> None:
    """All but ``x`` are parameters, whose sizes Dynamo takes as numbers."""
    shape = {"sample": (2, 64), "token": (2, 6, 64), "frame": (2, 3, 1, 64), "rows": (2, 5, 64)}[kind]
    fixed = {name: torch.randn(shape, device=DEVICE) for name in MODULATIONS[op]}
    fixed |= {f"{name}_table": torch.randn(64, device=DEVICE) for name in MODULATIONS[op]}
    fixed |= {} if op == "norm_scale_shift" else {"residual": torch.randn(2, 6, 64, device=DEVICE)}
    fixed |= {} if op == "scale_residual" else {"weight": torch.randn(64, device=DEVICE)}

    class Site(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in fixed.items():
                self.register_parameter(name, nn.Parameter(tensor))
            self.index = torch.arange(6, device=DEVICE).clamp(max=4).repeat(2, 1) if kind == "rows" else None

        def forward(self, x: Tensor) -> Any:
            return OPS[op](x=x, **{name: getattr(self, name) for name in fixed}, index=self.index, rounding="eager")

    x = torch.randn(2, 6, 64, device=DEVICE)
    site = Site()
    torch._dynamo.reset()
    compiled = torch.compile(site, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():  # under grad what is compiled is the expression, in the order of this device's sums
        torch.testing.assert_close(compiled(x), site(x), rtol=0, atol=0)


def test_an_op_is_one_node_of_the_graph() -> None:
    nodes: list[str] = []

    def look(graph: Any, inputs: list[Tensor]) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    call = arguments("scale_residual_norm_scale_shift")
    with torch.no_grad():
        torch.compile(OPS["scale_residual_norm_scale_shift"], backend=look, fullgraph=True)(**call)
    assert [n for n in nodes if "getitem" not in n] == ["ditnorm.scale_residual_norm_scale_shift.default"]


@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_gradients_under_compile(rounding: str) -> None:
    op = "scale_residual_norm_scale_shift"
    call = {name: t.detach().float() for name, t in arguments(op).items()}
    weights = torch.randn(2, 6, 64, device=DEVICE)
    results = []
    for function in (OPS[op], torch.compile(OPS[op], backend="aot_eager", fullgraph=True)):
        leaves = {name: t.clone().requires_grad_() for name, t in call.items()}
        y, r = function(**leaves, rounding=rounding)
        results.append([y, r, *torch.autograd.grad((y, r), list(leaves.values()), (weights, weights))])
    # float32; both sum at most 2 * 6 * 64 terms, in orders of their own.
    for compiled, plain in zip(*results, strict=True):
        assert (compiled - plain).norm() <= 2.0**-24 * 20 * 768**0.5 * plain.norm()


@pytest.mark.parametrize("op", OPS)
def test_export(op: str) -> None:
    class Call(nn.Module):
        def forward(self, **call: Tensor) -> Any:
            return OPS[op](**call, rounding="eager")

    call = arguments(op)
    with torch.no_grad():
        program = torch.export.export(Call(), (), call)
        torch.testing.assert_close(program.module()(**call), OPS[op](**call, rounding="eager"), rtol=0, atol=0)
    assert f"ditnorm.{op}.default" in program.graph_module.code.replace("torch.ops.", "")


def test_a_bad_call_fails_while_tracing() -> None:
    compiled = torch.compile(OPS["norm_scale_shift"], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"scale: got \[3, 64\] for x \[2, 6, 64\]"):
        compiled(torch.zeros(2, 6, 64, device=DEVICE), torch.zeros(3, 64, device=DEVICE))
