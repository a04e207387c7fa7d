"""Calls whose rows want gradients, under torch.compile: the kernels of eager training, its bits,
and no graph break.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support.cases import DEVICE, EPS, MODULATIONS, OPS, Shape, compiled_only, modulation
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from ditnorm.functional import (
    gelu,
    joint_qk_norm_rope,
    norm_scale_residual,
    norm_scale_residual_norm_scale_shift,
    norm_scale_shift,
    qk_norm_rope,
    swiglu,
)
from ditnorm.ops.gradients import GRADIENTS

pytestmark = compiled_only

SANDWICHES = {function.__name__: function for function in (norm_scale_residual, norm_scale_residual_norm_scale_shift)}
ACTIVATIONS = {"gelu": gelu, "swiglu": swiglu}
HEADS = {"qk_norm_rope": qk_norm_rope, "joint_qk_norm_rope": joint_qk_norm_rope}
FUNCTIONS: dict[str, Callable[..., Any]] = {**OPS, **HEADS, **SANDWICHES, **ACTIVATIONS}
BACKWARD = {op: f"ditnorm.{op}_backward.default" for op in FUNCTIONS} | {
    "norm_scale_residual_norm_scale_shift": "ditnorm.norm_scale_residual_backward.default",
    "gelu": "aten.gelu_backward.default",
}
WIDTH, HEAD = 64, 32


def arguments(op: str, tokens: int = 6) -> dict[str, Any]:
    def rows(count: int = tokens) -> Tensor:
        return torch.randn(2, count, WIDTH, device=DEVICE).bfloat16().requires_grad_()

    if op in OPS:
        call: dict[str, Any] = {name: rows() for name in ("residual", "x")[op == "norm_scale_shift" :]}
        return call | {name: modulation("chunk", Shape(2, tokens, WIDTH), torch.bfloat16) for name in MODULATIONS[op]}
    if op in ACTIVATIONS:
        return {name: rows() for name in ("x", "value", "beside") if name != "value" or op == "swiglu"}
    if op in SANDWICHES:
        gate = modulation("chunk", Shape(2, tokens, WIDTH), torch.bfloat16)
        return {"residual": rows(), "x": rows(), "x_weight": torch.randn(WIDTH, device=DEVICE).bfloat16(), "gate": gate}
    weight, names = torch.randn(HEAD, device=DEVICE).bfloat16(), ("query", "key", "value")[: 2 if op == "qk_norm_rope" else 3]
    call = {name: rows() for name in names} | {"query_weight": weight, "key_weight": weight, "head_dim": HEAD, "eps": EPS}
    call |= {"norm": "diffusers_rms", "rotary": torch.randn(tokens, HEAD // 2, dtype=torch.complex64, device=DEVICE)}
    if op == "joint_qk_norm_rope":
        call |= {f"encoder_{name}": rows(3) for name in names} | {"encoder_query_weight": weight, "encoder_key_weight": None}
        call |= {"encoder_rotary": None, "encoder_first": True}
    return call


def outputs_and_gradients(function: Callable[..., Any], call: dict[str, Any]) -> list[Tensor]:
    outputs = function(**call)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]
    torch.manual_seed(3)
    return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.randn_like(o) for o in outputs])]


def seen_by(graphs: list[list[str]]) -> Any:
    """A compiler that notes the ops of each graph, the forward one and the backward one."""

    def look(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=look, bw_compiler=look)


def bits_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("op", GRADIENTS)
def test_the_ops_of_eager_training_are_compiled_with_its_bits(op: str, rounding: str) -> None:
    torch._dynamo.reset()
    graphs: list[list[str]] = []
    compiled = torch.compile(FUNCTIONS[op], backend=seen_by(graphs), fullgraph=True)
    call = arguments(op) | {"rounding": rounding}
    assert bits_equal(outputs_and_gradients(compiled, call), outputs_and_gradients(FUNCTIONS[op], call))
    forward, backward = graphs
    assert f"ditnorm.{op}.default" in forward
    assert BACKWARD[op] in backward
    assert not [node for node in (*forward, *backward) if "norm" in node and not node.startswith("ditnorm.")]


def test_a_stream_that_goes_on_is_compiled_with_the_sum_of_eager_training() -> None:
    """Of diffusers' ``RMSNorm``, two of whose gradients are added one after the other."""

    def site(x: Tensor) -> tuple[Tensor, Tensor]:
        return norm_scale_shift(x, norm="diffusers_rms", eps=EPS, rounding="eager"), x * 2

    torch._dynamo.reset()
    graphs: list[list[str]] = []
    call = {"x": arguments("gelu")["x"]}
    got = outputs_and_gradients(torch.compile(site, backend=seen_by(graphs), fullgraph=True), call)
    assert bits_equal(got, outputs_and_gradients(site, call))
    assert "ditnorm.norm_scale_shift_backward_parts.default" in graphs[1]


@pytest.mark.parametrize("op", GRADIENTS)
def test_sequence_lengths_share_one_dynamic_graph(op: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(FUNCTIONS[op], backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (6, 8, 11):
        call = arguments(op, tokens) | {"rounding": "eager"}
        assert bits_equal(outputs_and_gradients(compiled, call), outputs_and_gradients(FUNCTIONS[op], call))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradient_checkpointing_around_what_is_compiled() -> None:
    op = "scale_residual_norm_scale_shift"
    call, compiled = arguments(op), torch.compile(FUNCTIONS[op], backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(FUNCTIONS[op], call)
    got = outputs_and_gradients(lambda **named: checkpoint(lambda *given: compiled(*given), *named.values(), use_reentrant=False), call)
    assert bits_equal(got, expected)


def test_what_makes_sums_over_rows_is_left_to_the_compiler() -> None:
    torch._dynamo.reset()
    graphs: list[list[str]] = []
    call = arguments("norm_scale_shift")
    call["scale"] = call["scale"].detach().clone().requires_grad_()
    outputs_and_gradients(torch.compile(FUNCTIONS["norm_scale_shift"], backend=seen_by(graphs), fullgraph=True), call)
    assert not [node for graph in graphs for node in graph if node.startswith("ditnorm.")]


def test_an_exported_program_has_pytorchs_operations_alone_where_gradients_are_wanted() -> None:
    class Site(nn.Module):
        def forward(self, **call: Tensor) -> Any:
            return FUNCTIONS["norm_scale_shift"](**call)

    program = torch.export.export(Site(), (), arguments("norm_scale_shift"), strict=True)
    assert "ditnorm" not in program.graph_module.code
