"""What no kernel takes and upstream's expression does: batches that are broadcast, float64. And
indexed modulations under autograd.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import expressions as diffusers
from support.cases import DEVICE, EPS, MODULATIONS, OPS, compiled_only, norm_scale_shift, scale_residual_norm_scale_shift, torch_norms
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import qk_norm_rope, scale_residual

B, S, D = 2, 6, 64


def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def site(x_batch: int, residual_batch: int, m_batch: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    call = {"residual": t(residual_batch, S, D, dtype=dtype), "x": t(x_batch, S, D, dtype=dtype)}
    return call | dict(zip(("gate", "scale", "shift"), t(m_batch, 3 * D, dtype=dtype).chunk(3, dim=-1), strict=True))


def upstream(residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r = residual + gate[:, None] * x
    return F.layer_norm(r, (D,), eps=EPS) * (1 + scale[:, None]) + shift[:, None], r


BATCHES = [batches for batches in torch.cartesian_prod(*[torch.tensor([1, B])] * 3).tolist() if len(set(batches)) > 1]


@torch_norms
@pytest.mark.parametrize(("x", "residual", "modulation"), BATCHES)
def test_a_batch_of_one_is_broadcast_as_upstream_does(x: int, residual: int, modulation: int) -> None:
    call = site(x, residual, modulation)
    y, r = upstream(**call)
    actual = scale_residual_norm_scale_shift(**call, rounding="eager")
    assert torch.equal(actual[0], y)
    assert torch.equal(actual[1], r)
    assert torch.equal(scale_residual(call["residual"], call["x"], call["gate"], rounding="eager"), r)
    normed = norm_scale_shift(call["x"], call["scale"], call["shift"], rounding="eager")
    assert torch.equal(normed, F.layer_norm(call["x"], (D,), eps=EPS) * (1 + call["scale"][:, None]) + call["shift"][:, None])

    whole = {name: m.expand(B, *m.shape[1:]) for name, m in call.items()}
    for single, expected in zip(scale_residual_norm_scale_shift(**call), scale_residual_norm_scale_shift(**whole), strict=True):
        torch.testing.assert_close(single, expected)


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_that_broadcasts_is_counted_as_unfused_also_when_compiled(op: str, rounding: str) -> None:
    call: dict[str, Any] = {name: m for name, m in site(1, 1, B).items() if name in ("x", *MODULATIONS[op])}
    call |= {} if op == "norm_scale_shift" else {"residual": t(1, S, D)}
    before = kernels.counts()
    expected = OPS[op](**call, rounding=rounding)
    assert {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]} == {(op, "reference"): 1}
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op], backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call, rounding=rounding), expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_batches_that_do_not_fit_are_errors(op: str) -> None:
    same = {} if op == "norm_scale_shift" else {"residual": t(1, S, D)}
    for name in MODULATIONS[op]:
        with pytest.raises(ValueError, match=rf"^{name}: got \[3, 64\] for x \[2, 6, 64\]"):
            OPS[op](x=t(2, S, D), **same, **{name: t(3, D)})
        with pytest.raises(ValueError, match=rf"^{name}: got \[3, 64\] for x \[6, 64\]"):  # [S, D] is one sample
            OPS[op](x=t(S, D), **{k: v[0] for k, v in same.items()}, **{name: t(3, D)})


@torch_norms
def test_gradients_of_a_broadcast_batch_are_upstreams() -> None:
    ours = {name: v.detach().requires_grad_() for name, v in site(B, 1, B, torch.float32).items()}
    theirs = {name: v.detach().clone().requires_grad_() for name, v in ours.items()}
    weights = t(B, S, D, dtype=torch.float32), t(B, S, D, dtype=torch.float32)
    torch.autograd.backward(scale_residual_norm_scale_shift(**ours, rounding="eager"), weights)
    torch.autograd.backward(upstream(**theirs), weights)
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", OPS)
def test_an_index_for_all_samples(op: str) -> None:
    call: dict[str, Any] = {"x": t(B, S, D)} | ({} if op == "norm_scale_shift" else {"residual": t(B, S, D)})
    call |= {name: t(B, 2, D) for name in MODULATIONS[op]} | {"rounding": "eager"}
    index = torch.randint(2, (1, S), device=DEVICE)
    before = kernels.counts()
    shared = OPS[op](**call, index=index)
    assert {path for (_, path), n in kernels.counts().items() if n != before[op, path]} <= {kernels.path, "reference"}
    for actual, expected in zip(_tuple(shared), _tuple(OPS[op](**call, index=index.repeat(B, 1))), strict=True):
        assert torch.equal(actual, expected)


@compiled_only
@pytest.mark.parametrize("op", OPS)
def test_an_index_for_all_samples_is_fused(op: str) -> None:
    call: dict[str, Any] = {"x": t(B, S, D)} | ({} if op == "norm_scale_shift" else {"residual": t(B, S, D)})
    before = kernels.counts()
    OPS[op](**call, **{name: t(B, 2, D) for name in MODULATIONS[op]}, index=torch.zeros(1, S, dtype=torch.int64, device=DEVICE))
    assert {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]} == {(op, kernels.path): 1}


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_float64_is_upstreams_expression(rounding: str) -> None:
    call = site(B, B, B, torch.float64)
    for actual, expected in zip(scale_residual_norm_scale_shift(**call, rounding=rounding), upstream(**call), strict=True):
        assert torch.equal(actual, expected)
    x, w = call["x"], t(D, dtype=torch.float64)
    torch.testing.assert_close(norm_scale_shift(x, weight=w, norm="rms", rounding=rounding), F.rms_norm(x, (D,), w, EPS), rtol=0, atol=0)
    query, _ = qk_norm_rope(x, x, w, w, head_dim=D, rounding=rounding)
    assert torch.equal(query[:, :, 0], F.rms_norm(x, (D,), w, EPS))


def test_wans_expression_in_float64() -> None:
    """It norms in float32 all the same; what it adds to modulations is float64."""
    x, out = t(B, S, D, dtype=torch.float64), t(B, S, D, dtype=torch.float64)
    table, temb = t(1, 6, D, dtype=torch.float64), t(B, 6, D, dtype=torch.float64)
    shift, scale, gate, *_ = diffusers.wan_modulation(table, temb)
    y = (F.layer_norm(x.float(), (D,), eps=EPS) * (1 + scale) + shift).type_as(x)
    rows, tables = temb.unbind(1), table[0].unbind()
    actual = norm_scale_shift(x, rows[1], rows[0], scale_table=tables[1], shift_table=tables[0], norm="fp32_layer", rounding="eager")
    assert torch.equal(actual, y)
    r = scale_residual(x, out, rows[2], gate_table=tables[2], rounding="eager")
    assert torch.equal(r, (x.float() + out.float() * gate).type_as(x))  # as after the feed-forward
    _, r = scale_residual_norm_scale_shift(x, out, rows[2], gate_table=tables[2], rounding="eager")
    assert torch.equal(r, diffusers.wan_residual(x, out, gate))  # as after self-attention


@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_gradcheck(rounding: str) -> None:
    call = {name: v[..., :4].detach().requires_grad_() for name, v in site(B, B, B, torch.float64).items()}
    names = list(call)

    def function(*tensors: Tensor) -> Any:
        return scale_residual_norm_scale_shift(**dict(zip(names, tensors, strict=True)), rounding=rounding)

    assert torch.autograd.gradcheck(function, tuple(call.values()))


@pytest.mark.parametrize("name", ["scale", "weight"])
def test_one_argument_in_float64(name: str) -> None:
    with torch.no_grad():
        y = norm_scale_shift(t(B, S, D), **{name: t(D, dtype=torch.float64)})
    assert y.dtype is torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("rows", [2, 3])
def test_gradients_of_rows_are_summed_before_they_are_rounded(rows: int, rounding: str) -> None:
    """Thousands of tokens share a row. Summed in bfloat16 one by one, their gradients would stop
    growing at a few hundred.
    """
    tokens = 3000
    scale = torch.zeros(rows, D, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    index = torch.arange(tokens, device=DEVICE) % rows
    x = t(1, tokens, D)
    y = norm_scale_shift(x, scale, index=index, rounding=rounding)
    weight = (F.layer_norm(x.float(), (D,), eps=EPS) > 0).to(y.dtype)
    (grad,) = torch.autograd.grad(y, scale, weight)
    n = F.layer_norm(x.float(), (D,), eps=EPS) * weight.float()
    exact = torch.stack([n[0, index == row].sum(0) for row in range(rows)])
    # Each of the sum's terms, and the sum, is rounded to bfloat16 once.
    assert ((grad.float() - exact).abs() <= 2.0**-8 * 2 * exact.abs()).all()


@torch_norms
def test_gradients_of_two_rows_are_upstreams() -> None:
    mod = t(2 * B, 3 * D)
    ours, theirs = mod.clone().requires_grad_(), mod.clone().requires_grad_()
    x, index, weight = t(B, 400, D), torch.randint(2, (B, 400), device=DEVICE), t(B, 400, D)
    shift, scale, _ = ours.unflatten(0, (2, -1)).transpose(0, 1).chunk(3, dim=-1)
    y = norm_scale_shift(x, scale, shift, index=index, rounding="eager")
    expected, _ = diffusers.qwen_modulate(F.layer_norm(x, (D,), eps=EPS), theirs, index)
    assert torch.equal(y, expected)
    y.backward(weight)
    expected.backward(weight)
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
