"""``rounding="eager"`` where dtypes are mixed, as after a quantised layer that returns float32:
upstream's expression, unfused.
"""

import pytest
import torch
import torch.nn.functional as F
from support.cases import DEVICE, norm_scale_shift, scale_residual_norm_scale_shift, torch_norms
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import scale_residual
from ditnorm.layers import ScaleResidualNormScaleShift

B, S, D = 2, 5, 64
MIXED = [  # the dtypes of the residual stream and of what is added to it
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]


def t(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def unfused(op: str, before: dict[tuple[str, str], int]) -> bool:
    """Whether exactly one call has been counted since, as one that PyTorch's operations serve."""
    return {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]} == {(op, "reference"): 1}


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype is expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("modulation", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("stream", "sublayer"), MIXED)
def test_a_sub_layer_in_another_dtype_promotes_qwen_images_stream(
    stream: torch.dtype, sublayer: torch.dtype, modulation: torch.dtype
) -> None:
    residual, x = t(B, S, D, dtype=stream), t(B, S, D, dtype=sublayer)
    gate, scale, shift = t(B, 1, 3 * D, dtype=modulation).chunk(3, dim=-1)
    r = residual + gate * x
    y = F.layer_norm(r, (D,), eps=1e-6) * (1 + scale) + shift

    before = kernels.counts()
    actual = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, rounding="eager")
    assert unfused("scale_residual_norm_scale_shift", before)
    assert same(actual[0], y)
    assert same(actual[1], r)

    before = kernels.counts()
    assert same(scale_residual(residual, x, gate, rounding="eager"), r)
    assert unfused("scale_residual", before)


@pytest.mark.parametrize(("stream", "sublayer"), MIXED)
def test_a_sub_layer_in_another_dtype_leaves_wans_stream_as_it_is_but_at_norm2(stream: torch.dtype, sublayer: torch.dtype) -> None:
    residual, x = t(B, S, D, dtype=stream), t(B, S, D, dtype=sublayer)
    gate, scale, shift = t(B, 1, 3 * D, dtype=torch.bfloat16).chunk(3, dim=-1)
    tables = {f"{name}_table": t(D, dtype=torch.float32) for name in ("gate", "scale", "shift")}
    weight, bias = t(D, dtype=torch.float32), t(D, dtype=torch.float32)
    r3 = (residual.float() + x * (gate.float() + tables["gate_table"])).type_as(residual)
    normed = F.layer_norm(r3.float(), (D,), eps=1e-6)
    y3 = (normed * (1 + (scale.float() + tables["scale_table"])) + (shift.float() + tables["shift_table"])).type_as(r3)
    actual = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **tables, norm="fp32_layer", rounding="eager")
    assert same(actual[0], y3)
    assert same(actual[1], r3)

    r2 = residual + x
    y2 = F.layer_norm(r2.float(), (D,), weight, bias, 1e-6).type_as(r2)
    affine = {"weight": weight, "bias": bias, "norm": "fp32_layer"}
    actual = scale_residual_norm_scale_shift(residual, x, **affine, rounding="eager")
    assert same(actual[0], y2)
    assert same(actual[1], r2)


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_a_modulation_in_another_half_precision_promotes(name: str) -> None:
    x = t(B, S, D, dtype=torch.bfloat16)
    modulation = {name: t(B, 1, D, dtype=torch.float16)}
    n = F.layer_norm(x, (D,), eps=1e-6)
    expected = n * (1 + modulation["scale"]) if name == "scale" else n + modulation["shift"]
    before = kernels.counts()
    assert same(norm_scale_shift(x, **modulation, rounding="eager"), expected)
    assert unfused("norm_scale_shift", before)


@pytest.mark.parametrize(("stream", "sublayer"), MIXED)
def test_mixed_dtypes_compile_without_a_graph_break_or_a_recompile(stream: torch.dtype, sublayer: torch.dtype) -> None:
    def site(residual: Tensor, x: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        y, r = scale_residual_norm_scale_shift(residual, x, m, m, m, rounding="eager")
        return y, r, norm_scale_shift(x, m, m, rounding="eager"), scale_residual(residual, x, m, rounding="eager")

    call = (t(B, S, D, dtype=stream), t(B, S, D, dtype=sublayer), t(B, 1, D, dtype=torch.bfloat16))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(site, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert all(same(a, b) for a, b in zip(compiled(*call), site(*call), strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_flow_through_mixed_dtypes() -> None:
    residual, x = t(B, S, D, dtype=torch.bfloat16), t(B, S, D, dtype=torch.float32).requires_grad_()
    scale_residual(residual, x, rounding="eager").sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@torch_norms
def test_a_hooked_layer_promotes_as_one_without_a_hook() -> None:
    layer = ScaleResidualNormScaleShift(D, elementwise_affine=False, rounding="eager").to(DEVICE)
    residual, x = t(B, S, D, dtype=torch.bfloat16), t(B, S, D, dtype=torch.float32)
    gate, scale = t(B, D, dtype=torch.bfloat16), t(B, D, dtype=torch.bfloat16)
    expected = layer(residual, x, gate=gate, scale=scale)
    layer.register_forward_hook(lambda module, args, output: None)
    assert all(same(a, b) for a, b in zip(layer(residual, x, gate=gate, scale=scale), expected, strict=True))
    modulated = {"gate": gate, "gate_table": t(D, dtype=torch.float32)}
    hooked = layer(residual, x, **modulated)
    layer._forward_hooks.clear()
    assert all(same(a, b) for a, b in zip(hooked, layer(residual, x, **modulated), strict=True))


def test_single_rounding_keeps_the_dtypes_of_its_arguments() -> None:
    residual, x = t(B, S, D, dtype=torch.bfloat16), t(B, S, D, dtype=torch.float32)
    y, r = scale_residual_norm_scale_shift(residual, x)
    assert (y.dtype, r.dtype) == (torch.float32, torch.bfloat16)
    assert scale_residual(residual, x).dtype is torch.bfloat16
