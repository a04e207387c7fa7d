"""Gradients, what is saved for them, and autocast."""

from typing import Any

import pytest
import torch
from support import expressions as diffusers
from support.cases import (
    DEVICE,
    EPS,
    LAYOUTS,
    MODE,
    MODULATIONS,
    OPS,
    ROWS,
    VIEWS,
    Shape,
    dense,
    modulation,
    norm_scale_shift,
    reference_only,
    scale_residual_norm_scale_shift,
    torch_norms,
)
from torch import Tensor
from torch.autograd import forward_ad

from ditnorm import kernels
from ditnorm.functional import scale_residual

SHAPE = Shape(2, 6, 24, frames=2, rows=3)


def leaf(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(dtype).to(DEVICE).requires_grad_()


def exact(call: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op's outputs in float64 arithmetic, differentiable."""
    x, index = call["x"], call.get("index")

    def m(name: str, default: float) -> Tensor:
        if name not in call:
            return torch.tensor(default, dtype=torch.float64, device=x.device)
        value = dense(call[name], x, index)
        return value + call[f"{name}_table"].double() if f"{name}_table" in call else value

    v = x.double()
    r = None
    if "residual" in call:
        v = r = call["residual"].double() + m("gate", 1.0) * v
        if "norm" not in call:
            return (r,)
    centred = v if call["norm"] == "rms" else v - v.mean(-1, keepdim=True)
    n = centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = n * call["weight"].double() + call["bias"].double()
    y = n * (1 + m("scale", 0.0)) + m("shift", 0.0)
    return (y,) if r is None else (y, r)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *VIEWS, *ROWS])
@pytest.mark.parametrize("op", OPS)
def test_single_gradients_against_float64(op: str, layout: str, norm: str) -> None:
    if op == "scale_residual" and norm == "rms":
        pytest.skip("scale_residual has no norm")
    torch.manual_seed(1)
    call: dict[str, Any] = {"x": leaf(2, 6, 24)}
    if op != "norm_scale_shift":
        call["residual"] = leaf(2, 6, 24)
    if op != "scale_residual":
        call |= {"weight": leaf(24), "bias": leaf(24), "norm": norm}
    for name in MODULATIONS[op]:
        call[name] = modulation(layout, SHAPE, torch.float32).requires_grad_()
        call[f"{name}_table"] = leaf(24)
    if layout in ROWS:
        call["index"] = torch.randint(3, (2, 6), device=DEVICE)
    leaves = {name: value for name, value in call.items() if isinstance(value, Tensor) and value.requires_grad}
    expected = exact(call)
    weights = [torch.randn_like(t) for t in expected]
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), weights)

    outputs = OPS[op](**call)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, list(leaves.values()), [w.float() for w in weights])

    # Each gradient sums at most 2 * 6 * 24 products of at most ~10 roundings of terms of the size
    # of the gradients' own scale.
    for name, grad, wanted in zip(leaves, grads, expected_grads, strict=True):
        assert grad.shape == wanted.shape, name
        assert (grad.double() - wanted).norm() <= 2.0**-24 * 10 * 288**0.5 * wanted.norm(), name


def test_each_input_may_need_a_gradient_alone() -> None:
    for needs in ("residual", "x", "gate", "scale", "shift", "weight", "bias"):
        call = {name: torch.randn(2, 3, 8, device=DEVICE) for name in ("residual", "x")}
        call |= {name: torch.randn(2, 1, 8, device=DEVICE) for name in ("gate", "scale", "shift")}
        call |= {name: torch.randn(8, device=DEVICE) for name in ("weight", "bias")}
        call[needs].requires_grad_()
        y, r = scale_residual_norm_scale_shift(**call)
        (y.sum() + r.sum()).backward()
        assert call[needs].grad is not None
        assert [name for name, t in call.items() if t.grad is not None] == [needs]


def _eager_pair(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ours = {"residual": leaf(2, 6, 24, dtype=dtype), "x": leaf(2, 6, 24, dtype=dtype), "mod": leaf(2, 72, dtype=dtype)}
    return ours, {name: t.detach().clone().requires_grad_() for name, t in ours.items()}


@torch_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_gradients_are_upstreams(dtype: torch.dtype) -> None:
    ours, theirs = _eager_pair(dtype)
    shift, scale, gate = ours["mod"].chunk(3, dim=-1)
    y, r = scale_residual_norm_scale_shift(ours["residual"], ours["x"], gate, scale, shift, rounding="eager")
    last = scale_residual(r, norm_scale_shift(y, scale, shift, rounding="eager"), gate, rounding="eager")

    layer_norm = torch.nn.functional.layer_norm
    _, upstream_gate = diffusers.qwen_modulate(theirs["residual"], theirs["mod"])
    upstream_r = theirs["residual"] + upstream_gate * theirs["x"]
    upstream_y, _ = diffusers.qwen_modulate(layer_norm(upstream_r, (24,), eps=EPS), theirs["mod"])
    upstream_last = upstream_r + upstream_gate * diffusers.qwen_modulate(layer_norm(upstream_y, (24,), eps=EPS), theirs["mod"])[0]

    assert torch.equal(last, upstream_last)
    weights = torch.randn_like(last)
    last.backward(weights)
    upstream_last.backward(weights)
    for name, t in ours.items():
        assert torch.equal(t.grad, theirs[name].grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_single_saves_its_inputs_only(op: str, compiled: bool) -> None:
    call: dict[str, Any] = {"x": leaf(2, 64, 96, dtype=torch.bfloat16)}
    if op != "norm_scale_shift":
        call["residual"] = leaf(2, 64, 96, dtype=torch.bfloat16)
    call |= {name: leaf(2, 96, dtype=torch.bfloat16) for name in MODULATIONS[op]}
    kept = {t.untyped_storage().data_ptr() for t in call.values()}
    saved: list[Tensor] = []
    function = torch.compile(OPS[op], backend="aot_eager_decomp_partition", fullgraph=True) if compiled else OPS[op]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        outputs = function(**call)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if compiled or MODE != "reference":  # an output (r) may be kept in place of two inputs; the compiler keeps a float a row, too
        kept |= {t.untyped_storage().data_ptr() for t in outputs}
    rows = 2 * 64 if compiled else 0
    assert not [t.shape for t in saved if t.untyped_storage().data_ptr() not in kept and t.numel() > rows]
    sum(t.sum() for t in outputs).backward()
    assert all(t.grad is not None for t in call.values())


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_inference_builds_no_graph(op: str, rounding: str) -> None:
    call: dict[str, Any] = {"x": leaf(2, 3, 8), "rounding": rounding} | ({} if op == "norm_scale_shift" else {"residual": leaf(2, 3, 8)})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = OPS[op](**call)
            assert all(t.grad_fn is None and not t.requires_grad for t in (outputs if isinstance(outputs, tuple) else (outputs,)))


@reference_only
def test_double_backward_through_a_recomputation_is_refused_rather_than_wrong() -> None:
    x = leaf(1, 2, 8)
    y = norm_scale_shift(x, leaf(8))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "autocast_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_eager_under_autocast_equals_upstream_under_autocast(dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
    residual, x, mod = (t.detach() for t in _eager_pair(dtype)[0].values())
    mod = mod.to(autocast_dtype)  # what a Linear under autocast makes
    shift, scale, gate = mod.chunk(3, dim=-1)
    with torch.autocast(DEVICE, autocast_dtype), torch.no_grad():
        _, upstream_gate = diffusers.qwen_modulate(residual, mod)
        upstream_r = residual + upstream_gate * x
        upstream_y, _ = diffusers.qwen_modulate(torch.nn.functional.layer_norm(upstream_r, (24,), eps=EPS), mod)
        y, r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, rounding="eager")
        assert torch.equal(r, upstream_r.to(r.dtype))
        assert torch.equal(y, upstream_y.to(y.dtype))
        assert torch.equal(scale_residual(residual, x, gate, rounding="eager"), upstream_r.to(dtype))


@reference_only
def test_anomaly_free_gradients_with_expanded_inputs() -> None:
    x = torch.randn(1, 3, 8, requires_grad=True)
    norm_scale_shift(x.expand(4, 3, 8), torch.randn(4, 8)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_a_call_under_grad_is_counted_as_what_serves_it(op: str) -> None:
    x = torch.randn(1, 4, 8, device=DEVICE, requires_grad=True)
    before = kernels.counts()
    modulations = {name: leaf(8) for name in MODULATIONS[op]}
    OPS[op](**({"x": x} if op == "norm_scale_shift" else {"residual": x, "x": x}), **modulations, rounding="eager")
    assert {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]} == {
        (op, "reference" if MODE == "reference" else kernels.path): 1
    }


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_gradients_are_those_of_the_unfused_expression(grad: bool, rounding: str) -> None:
    # The kernels know no tangents, and an op without a formula would return zeros.
    x, tangent, scale, shift = torch.randn(4, 2, 5, 8, device=DEVICE)
    modulations = {"scale": scale, "shift": shift}
    expected = torch.func.jvp(lambda x: torch.nn.functional.layer_norm(x, (8,)) * (1 + scale) + shift, (x,), (tangent,))[1]
    with torch.set_grad_enabled(grad):
        output = torch.func.jvp(lambda x: norm_scale_shift(x, **modulations, eps=1e-5, rounding=rounding), (x,), (tangent,))[1]
        torch.testing.assert_close(output, expected)
        with forward_ad.dual_level():
            dual = norm_scale_shift(forward_ad.make_dual(x, tangent), **modulations, eps=1e-5, rounding=rounding)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
