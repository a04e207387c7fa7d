"""The kernels that make the gradients of rows: their bits, their accuracy, and what they save.

LoRA training wants no others. The forward pass is fused, too, where they serve.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import aten_replay
from support.cases import (
    DEVICE,
    EPS,
    FLOATS,
    LAYOUTS,
    MODE,
    MODULATIONS,
    OPS,
    ROWS,
    VIEWS,
    X_LAYOUTS,
    Shape,
    activation,
    compiled_only,
    modulation,
    selection,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditnorm import kernels
from ditnorm.functional import qk_norm_rope, scale_residual
from ditnorm.ops.calls import NormScaleShift, ScaleResidualNormScaleShift
from ditnorm.ops.reference import modulation as laid_out
from ditnorm.ops.reference import upcast
from ditnorm.ops.table import OPS as TABLE

pytestmark = compiled_only

WIDTHS = (20, 64, 100, 1024, 1536, 2432, 3072, 5120, 6656)  # one without 16-byte rows, one of any width, all kinds of tiles
HALVES = (torch.bfloat16, torch.float16)
UNIT = 2.0**-24
ROW_NAMES = ("residual", "x")


def site(op: str, shape: Shape, dtype: torch.dtype, m_dtype: torch.dtype, layout: str = "sample", **more: Any) -> dict[str, Any]:
    """Arguments of a call whose rows want gradients."""
    call: dict[str, Any] = {name: activation("contiguous", shape, dtype) for name in ROW_NAMES[op == "norm_scale_shift" :]}
    call |= {name: modulation(layout, shape, m_dtype) for name in MODULATIONS[op]}
    if layout in ROWS:
        call["index"] = selection("int64", shape)
    if op != "scale_residual":
        call |= {"norm": "layer", "eps": EPS}
    call |= more
    return call | {name: call[name].detach().requires_grad_() for name in ROW_NAMES if name in call}


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def gradients(outputs: Sequence[Tensor], call: dict[str, Any], cotangents: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, [call[name] for name in ROW_NAMES if name in call], cotangents))


def fused(op: str, call: dict[str, Any], cotangents: Sequence[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the rows, which kernels have made, and the cotangents they came from."""
    before = kernels.counts()
    outputs = outputs_of(OPS[op](**call))
    cotangents = [torch.randn(o.shape).to(o) for o in outputs] if cotangents is None else list(cotangents)
    result = gradients(outputs, call, cotangents)
    assert not [key for key, n in kernels.counts().items() if n != before[key] and key[1] == "reference"]
    return result, cotangents


def unfused(op: str, call: dict[str, Any], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Autograd's gradients of the unfused expression; with the host build, with CUDA's norms."""
    arguments = {name: call.get(name) for name in TABLE[op].call._fields}
    if MODE != "cpu_sim" or op == "scale_residual":
        return gradients(outputs_of(TABLE[op].expression(**arguments)), call, cotangents)
    forward: Any = TABLE[op].call(**arguments)
    v = call["x"].detach() if op == "norm_scale_shift" else TABLE[op].reference(forward)[1].detach()
    law = upcast(forward)
    dn = cotangents[0] if law is None else cotangents[0].to(law)
    if (scale := laid_out(forward, "scale", law)) is not None:
        dn = dn * (1 + scale)
    total = aten_replay.norm_backward(dn, v if law is None else v.to(law), call.get("weight"), EPS, centred=call["norm"] != "rms")
    total = total.to(v.dtype)
    if op == "norm_scale_shift":
        return [total]
    total = cotangents[1] + total
    return [total, (total * laid_out(forward, "gate", law)).to(v.dtype)]


@pytest.mark.sanitize
@pytest.mark.parametrize("norm", ["layer", "rms", "fp32_layer"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", OPS)
def test_eager_gradients_have_the_bits_of_autograd(op: str, dtype: torch.dtype, wide: bool, norm: str) -> None:
    if op == "scale_residual" and norm != "layer":
        pytest.skip("scale_residual has no norm")
    rows = 3 if MODE == "cpu_sim" else 512  # a wrong order shows in one row of a hundred
    for width in WIDTHS:
        for affine in (False, True) if op != "scale_residual" else (False,):
            more: dict[str, Any] = {"rounding": "eager"} | ({} if op == "scale_residual" else {"norm": norm})
            if affine:
                more["weight"] = modulation("vector", Shape(1, 1, width), dtype) + 1
            call = site(op, Shape(2, rows, width), dtype, torch.float32 if wide else dtype, **more)
            got, cotangents = fused(op, call)
            for a, b in zip(got, unfused(op, call, cotangents), strict=True):
                assert torch.equal(a, b), f"{width}, affine {affine}: {int((a != b).sum())} of {a.numel()} elements differ"


@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("op", ["norm_scale_shift", "scale_residual_norm_scale_shift"])
def test_gradients_at_the_widths_of_models_have_the_bits_of_the_generic_kernel(op: str, tables: bool, norm: str, rounding: str) -> None:
    dtype = torch.bfloat16
    for width in (1536, 3072, 5120):
        shape = Shape(2, 3, width)
        call = site(op, shape, dtype, dtype, norm=norm, rounding=rounding)
        if tables:
            call |= {f"{name}_table": modulation("vector", shape, torch.float32) for name in MODULATIONS[op]}
        for gated in (True, False)[: len(MODULATIONS[op]) - 1]:
            given = {name: value for name, value in call.items() if gated or not name.startswith("gate")}
            got, cotangents = fused(op, given)
            # Where no wide access starts the generic kernel serves.
            unaligned = [activation("unaligned", shape, dtype).copy_(c) for c in cotangents]
            for a, b in zip(got, fused(op, given, unaligned)[0], strict=True):
                assert torch.equal(a, b), f"{width}, gated {gated}: {int((a != b).sum())} of {a.numel()} elements differ"


def exact_gradients(op: str, call: dict[str, Any], cotangents: Sequence[Tensor]) -> list[Tensor]:
    wide = {name: t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in call.items()}
    wide |= {name: wide[name].requires_grad_() for name in ROW_NAMES if name in wide}
    arguments = {name: wide.get(name) for name in TABLE[op].call._fields} | {"rounding": "single"}
    if op != "scale_residual_norm_scale_shift":
        return gradients(outputs_of(TABLE[op].expression(**arguments)), wide, [c.double() for c in cotangents])
    # The norm reads the rounded r.
    stored = OPS[op](**call)[1].detach().double().requires_grad_()
    of_norm = {name: value for name, value in arguments.items() if name in NormScaleShift._fields} | {"x": stored}
    (through,) = torch.autograd.grad(TABLE["norm_scale_shift"].expression(**of_norm), stored, cotangents[0].double())
    total = through + cotangents[1].double()
    gate = laid_out(ScaleResidualNormScaleShift(**arguments), "gate", torch.float64)
    return [total, total * (1 if gate is None else gate)]


def close(got: Tensor, expected: Tensor, roundings: int) -> None:
    """``roundings`` to the dtype of ``got``, none of terms larger than a few times the result, and
    sums in float32.
    """
    bound = roundings * torch.finfo(got.dtype).eps / 2 + UNIT * 10 * got.shape[-1] ** 0.5
    assert got.isfinite().all()
    assert (got.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *VIEWS, *ROWS])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_every_layout_against_float64(op: str, layout: str, rounding: str) -> None:
    shape = Shape(2, 6, 128, frames=3, rows=3)
    for dtype, m_dtype in ((torch.float32, torch.float32), *((h, m) for h in HALVES for m in (h, torch.float32))):
        for tables in (False, True):
            more = {f"{name}_table": modulation("vector", shape, torch.float32) for name in MODULATIONS[op]} if tables else {}
            call = site(op, shape, dtype, m_dtype, layout, rounding=rounding, **more)
            got, cotangents = fused(op, call)
            for a, b in zip(got, exact_gradients(op, call, cotangents), strict=True):
                close(a, b, 1 if rounding == "single" else 6)


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_a_call_without_modulations(op: str, rounding: str) -> None:
    for dtype in FLOATS:
        call = site(op, Shape(2, 4, 64), dtype, dtype, rounding=rounding)
        call = {name: value for name, value in call.items() if name not in MODULATIONS[op]}
        got, cotangents = fused(op, call)
        for a, b in zip(got, exact_gradients(op, call, cotangents), strict=True):
            close(a, b, 3)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", X_LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_rows_and_their_gradients_may_have_any_strides(op: str, layout: str) -> None:
    shape = Shape(2, 5, 64)
    call = site(op, shape, torch.bfloat16, torch.bfloat16)
    cotangents = [activation(layout, shape, torch.bfloat16) for _ in range(2 if op == "scale_residual_norm_scale_shift" else 1)]
    strided = dict(call)
    for name in (name for name in ROW_NAMES if name in call and layout != "expanded"):  # those hold the same row several times
        strided[name] = activation(layout, shape, torch.bfloat16).copy_(call[name].detach()).requires_grad_()
    expected, _ = fused(op, call, [c.contiguous() for c in cotangents])
    for a, b in zip(fused(op, strided, cotangents)[0], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.sanitize
@pytest.mark.parametrize("op", OPS)
def test_a_rows_gradient_depends_on_no_other_row_and_is_the_same_again(op: str) -> None:
    for dtype in FLOATS:
        call = site(op, Shape(3, 7, 1536), dtype, dtype)
        whole, cotangents = fused(op, call)
        for a, b in zip(fused(op, call, cotangents)[0], whole, strict=True):
            assert torch.equal(a, b)
        names = (*ROW_NAMES, *MODULATIONS[op])
        part = {name: t.detach()[1:2] if name in names else t for name, t in call.items()}
        part |= {name: part[name].requires_grad_() for name in ROW_NAMES if name in part}
        for a, b in zip(fused(op, part, [c[1:2] for c in cotangents])[0], whole, strict=True):
            assert torch.equal(a, b[1:2])


@pytest.mark.parametrize("op", OPS)
def test_bad_rows_stay_by_themselves(op: str) -> None:
    call = site(op, Shape(1, 4, 64), torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        call["x"][0, 1, 3], call["x"][0, 2, 5] = float("nan"), float("inf")
    got, _ = fused(op, call)
    for gradient in got:
        assert gradient[0, [0, 3]].isfinite().all()
        if op != "scale_residual":  # whose gradient depends on no row
            assert gradient[0, [1, 2]].isnan().any(-1).all()


@pytest.mark.parametrize("op", OPS)
def test_an_index_out_of_range_makes_gradients_of_nan(op: str) -> None:
    shape = Shape(1, 4, 64, rows=2)
    call = site(op, shape, torch.bfloat16, torch.bfloat16, "rows", index=torch.tensor([0, 1, 5, -1], device=DEVICE))
    *_, of_x = fused(op, call)[0]
    assert of_x[0, 2:].isnan().all()
    assert of_x[0, :2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 64), (2, 0, 64)])
@pytest.mark.parametrize("op", OPS)
def test_empty_tensors(op: str, shape: tuple[int, int, int]) -> None:
    call = site(op, Shape(1, 1, 64), torch.bfloat16, torch.bfloat16, "vector")
    call |= {name: torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for name in ROW_NAMES if name in call}
    assert all(gradient.shape == shape for gradient in fused(op, call)[0])


@pytest.mark.parametrize("op", OPS)
def test_two_dims(op: str) -> None:
    call = site(op, Shape(1, 5, 64), torch.bfloat16, torch.bfloat16)
    expected, cotangents = fused(op, call)
    flat = call | {name: call[name].detach()[0].requires_grad_() for name in ROW_NAMES if name in call}
    for a, b in zip(fused(op, flat, [c[0] for c in cotangents])[0], expected, strict=True):
        assert torch.equal(a, b[0])


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_one_row_an_op_is_saved_and_modulations_by_reference(op: str, rounding: str) -> None:
    call = site(op, Shape(2, 64, 96), torch.bfloat16, torch.bfloat16, rounding=rounding)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        outputs = outputs_of(OPS[op](**call))
    own = {t.untyped_storage().data_ptr() for t in (*outputs, *(t for t in call.values() if isinstance(t, Tensor)))}
    assert all(t.untyped_storage().data_ptr() in own for t in saved)
    assert sum(t.shape == call["x"].shape for t in saved) == (op != "scale_residual")
    sum(t.sum() for t in outputs).backward()
    assert all(call[name].grad is not None for name in ROW_NAMES if name in call)


@pytest.mark.parametrize("layout", ["sample", "token"])
@pytest.mark.parametrize("op", OPS)
def test_hooks_see_nothing_of_what_is_small_and_wants_no_gradient(op: str, layout: str) -> None:
    """Those of checkpointing take longer for a tensor than a kernel."""
    call = site(op, Shape(2, 64, 96), torch.bfloat16, torch.bfloat16, layout)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        outputs = outputs_of(OPS[op](**call))
    assert len(saved) == (op != "scale_residual") + (len(MODULATIONS[op]) if layout == "token" else 0)
    sum(t.sum() for t in outputs).backward()


@pytest.mark.parametrize("layout", ["sample", "token"])
@pytest.mark.parametrize("op", OPS)
def test_a_modulation_that_changed_in_place_is_an_error(op: str, layout: str) -> None:
    for name in MODULATIONS[op]:
        call = site(op, Shape(2, 3, 64), torch.float32, torch.float32, layout)
        outputs = outputs_of(OPS[op](**call))
        call[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(t.sum() for t in outputs).backward()


def test_gradients_of_one_result_alone() -> None:
    op = "scale_residual_norm_scale_shift"
    call = site(op, Shape(2, 3, 64), torch.float32, torch.float32)
    y, r = OPS[op](**call)
    weight = torch.randn_like(y)
    for output in (y, r):
        got = torch.autograd.grad(output, [call["residual"], call["x"]], weight, retain_graph=True)
        cotangents = [weight if t is output else torch.zeros_like(weight) for t in (y, r)]
        for a, b in zip(got, exact_gradients(op, call, cotangents), strict=True):
            close(a, b, 2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_gradient_checkpointing(op: str, reentrant: bool) -> None:
    call = site(op, Shape(2, 3, 64), torch.bfloat16, torch.bfloat16)
    expected, cotangents = fused(op, call)
    names = [name for name in ROW_NAMES if name in call]
    rest = {name: value for name, value in call.items() if name not in names}
    inputs = map(call.get, names)
    outputs = checkpoint(lambda *rows: OPS[op](**dict(zip(names, rows, strict=True)), **rest), *inputs, use_reentrant=reentrant)
    torch.autograd.backward(outputs_of(outputs), cotangents)
    for name, gradient in zip(names, expected, strict=True):
        assert torch.equal(call[name].grad, gradient)


@pytest.mark.parametrize("op", ["norm_scale_shift", "scale_residual_norm_scale_shift", "qk_norm_rope"])
def test_double_backward_is_that_of_the_expression(op: str) -> None:
    def second(function: Any) -> list[Tensor]:
        torch.manual_seed(5)
        if op == "qk_norm_rope":
            call: dict[str, Any] = {name: torch.randn(1, 3, 64, device=DEVICE).requires_grad_() for name in ("query", "key")}
            rows, options = list(call.values()), {"head_dim": 32, "norm": "diffusers_rms", "eps": EPS, "rounding": "eager"}
        else:
            call = site(op, Shape(1, 3, 32), torch.float32, torch.float32, rounding="eager")
            rows, options = [call[name] for name in ROW_NAMES if name in call], {}
        outputs = outputs_of(function(**call, **options))
        first = torch.autograd.grad(outputs, rows, [o.detach().square() for o in outputs], create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(3).sum() for g in first), rows))

    kernel = qk_norm_rope if op == "qk_norm_rope" else OPS[op]
    reference = lambda **call: TABLE[op].expression(**{name: call.get(name) for name in TABLE[op].call._fields})  # noqa: E731
    for a, b in zip(second(kernel), second(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "rms", "fp32_layer"])
@pytest.mark.parametrize("layout", ["vector", "sample", "token", "frame", "rows"])
@pytest.mark.parametrize("op", OPS)
def test_sums_over_rows_have_the_bits_of_autograd_and_are_the_same_again(op: str, layout: str, norm: str) -> None:
    if op == "scale_residual" and norm != "layer":
        pytest.skip("scale_residual has no norm")
    shape = Shape(2, 6, 96, frames=3, rows=3)
    for dtype, m_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        for tables in (False, True):
            more = {f"{name}_table": modulation("vector", shape, torch.float32) for name in MODULATIONS[op]} if tables else {}
            affine = ("weight", "bias") if op != "scale_residual" else ()
            more |= {name: modulation("vector", shape, dtype) for name in affine} | ({"norm": norm} if affine else {})
            call = site(op, shape, dtype, m_dtype, layout, rounding="eager", **more)
            wanted = [name for name in (*MODULATIONS[op], *more) if name != "norm"]
            call |= {name: call[name].detach().requires_grad_() for name in wanted}
            arguments = {name: call.get(name) for name in TABLE[op].call._fields}
            outputs = outputs_of(OPS[op](**call))
            cotangents = [torch.randn_like(o) for o in outputs]
            leaves = [call[name] for name in wanted]
            got = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
            again = torch.autograd.grad(outputs, leaves, cotangents)
            expected = torch.autograd.grad(outputs_of(TABLE[op].expression(**arguments)), leaves, cotangents)
            for name, a, b, c in zip(wanted, got, again, expected, strict=True):
                assert torch.equal(a, b), name
                if MODE == "cuda" or op != "scale_residual_norm_scale_shift" or "gate" not in name:  # through the CPU's LayerNorm
                    assert torch.equal(a, c), name


def test_a_tensor_at_two_places_gets_its_gradient_once_when_that_is_differentiated() -> None:
    x, both = (torch.randn(1, 3, 32, device=DEVICE).requires_grad_() for _ in range(2))
    (got,) = torch.autograd.grad(OPS["norm_scale_shift"](x=x, scale=both, shift=both, eps=EPS).sum(), both, create_graph=True)
    y = torch.nn.functional.layer_norm(x, (32,), eps=EPS) * (1 + both) + both
    (expected,) = torch.autograd.grad(y.sum(), both, create_graph=True)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_rows_that_outlived_a_function_transform_keep_their_history(op: str) -> None:
    call, weight = site(op, Shape(1, 3, 64), torch.float32, torch.float32), torch.randn(1, 3, 64, device=DEVICE).requires_grad_()
    left: list[Tensor] = []

    def leaves_a_tensor_behind(x: Tensor) -> Tensor:
        left.append(x * 2)
        return x.sum()

    torch.func.grad(leaves_a_tensor_behind)(weight)
    expected, cotangents = fused(op, call | {"x": (weight * 2).detach().requires_grad_()})
    outputs = outputs_of(OPS[op](**call | {"x": left[0]}))
    (got,) = torch.autograd.grad(outputs, weight, cotangents)
    assert torch.equal(got, 2 * expected[-1])


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    call = site(op, Shape(2, 6, 64), torch.bfloat16, torch.bfloat16)
    rows, modulations = torch.randn(2, 6, 64, device=DEVICE).bfloat16(), [call[name] for name in MODULATIONS[op]]
    tables = [torch.randn(64, device=DEVICE) for _ in modulations]
    flat: tuple[Any, ...] = (rows, *modulations, *tables, None, 1)
    if op != "scale_residual":
        flat = (rows, rows.clone(), rows.clone(), *modulations, torch.randn(64, device=DEVICE), *tables, None, 0, 1e-6, 1)
    torch.library.opcheck(getattr(kernels.ops, f"{op}_backward").default, flat, test_utils=("test_schema", "test_faketensor"))


def test_several_gradients_at_once_are_those_of_one_at_a_time() -> None:
    # Of the gate too, which is a sum over rows.
    residual, x, gate = (torch.randn(2, rows, 32, device=DEVICE, requires_grad=True) for rows in (5, 5, 1))
    r = scale_residual(residual, x, gate, rounding="eager")
    cotangents, tensors = torch.randn(4, *r.shape, device=r.device), (residual, x, gate)
    found = torch.autograd.grad(r, tensors, cotangents, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        one = torch.autograd.grad(r, tensors, cotangents[i], retain_graph=True)
        assert all(torch.allclose(a[i], b, rtol=1e-5, atol=1e-5) for a, b in zip(found, one, strict=True))
