"""The gradients of rows at norm sites of diffusers' RMSNorm over the whole width, and of a branch
that it norms.
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

from ditnorm import functional, kernels
from ditnorm.ops.bits import same_bits
from ditnorm.ops.table import OPS

pytestmark = compiled_only

SITES = {
    "norm_scale_shift": ("scale", "shift", "weight"),
    "scale_residual_norm_scale_shift": ("gate", "scale", "shift", "weight"),
    "norm_scale_residual_norm_scale_shift": ("x_weight", "gate", "scale", "shift", "weight"),
    "norm_scale_residual": ("x_weight", "gate"),
}
# Widths of models, those that end inside of an access of a warp, and those of other orders.
WIDTHS = (3840, 2304, 2048, 4096, 136, 1160, 5120, 128, 132, 24, 20)
ROW_NAMES = ("residual", "x")


def site(op: str, shape: Shape, dtype: torch.dtype, layout: str = "chunk_3d", rows: str = "contiguous") -> dict[str, Any]:
    """All that the op takes; each row has its own scale."""
    spread = torch.randn(shape.batch, shape.tokens, 1, device=DEVICE).exp()
    given: dict[str, Any] = {}
    for name in ROW_NAMES[op == "norm_scale_shift" :]:
        row = activation(rows, shape, dtype)
        given[name] = ((row * spread).to(dtype) if rows == "contiguous" else row).detach().requires_grad_()
    for name in SITES[op]:
        vector = name.endswith("weight")
        given[name] = (1 + 0.3 * torch.randn(shape.width)).to(dtype).to(DEVICE) if vector else modulation(layout, shape, dtype)
    if layout in ROWS:
        given["index"] = selection("int64", shape)
    return given


def run(op: str, given: dict[str, Any], rounding: str) -> tuple[Tensor, ...]:
    norm = {} if op.startswith("norm_scale_residual") else {"norm": "diffusers_rms"}
    result = getattr(functional, op)(**given, **norm, eps=EPS, rounding=rounding)
    return result if isinstance(result, tuple) else (result,)


def wanted(given: dict[str, Any]) -> list[Tensor]:
    return [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]


def fused(op: str, given: dict[str, Any], rounding: str, cotangents: Sequence[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients, which kernels have made, and the cotangents they came from."""
    before = kernels.counts()
    outputs = run(op, given, rounding)
    cotangents = [torch.randn(o.shape).to(o) for o in outputs] if cotangents is None else list(cotangents)
    found = torch.autograd.grad(outputs, wanted(given), cotangents)
    assert not [key for key, n in kernels.counts().items() if n != before[key] and key[1] == "reference"]
    return list(found), cotangents


def expression(op: str, given: dict[str, Any], rounding: str) -> tuple[Tensor, ...]:
    fields = OPS[op].call._fields  # type: ignore[attr-defined]
    options = {"norm": "diffusers_rms", "eps": EPS, "rounding": rounding}
    result = OPS[op].expression(**{name: given.get(name, options.get(name)) for name in fields})
    return result if isinstance(result, tuple) else (result,)


def unfused(op: str, given: dict[str, Any], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Autograd's gradients of the unfused expression; with the host build, in CUDA's order."""
    if MODE != "cpu_sim":
        return list(torch.autograd.grad(expression(op, given, "eager"), wanted(given), cotangents))
    dr: Tensor | None = cotangents[-1]
    if op != "norm_scale_residual":
        dr = None if op == "norm_scale_shift" else dr
        v = given["x"] if dr is None else run(op, given, "eager")[1]
        d = cotangents[0] if given.get("scale") is None else cotangents[0] * (1 + given["scale"])
        dr = aten_replay.diffusers_rms_norm_backward(d, v.detach(), given.get("weight"), EPS, dr)
        if op == "norm_scale_shift":
            return [dr]
    assert dr is not None
    d = dr if given.get("gate") is None else dr * given["gate"]
    if op == "scale_residual_norm_scale_shift":
        return [dr, d]
    return [dr, aten_replay.diffusers_rms_norm_backward(d, given["x"].detach(), given.get("x_weight"), EPS)]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", SITES)
@pytest.mark.parametrize("width", WIDTHS)
def test_eager_gradients_have_the_bits_of_autograd(width: int, op: str, dtype: torch.dtype) -> None:
    """Of few rows, which ATen gives more lanes, and of many."""
    for rows in (1, 200 if MODE == "cuda" else 9):
        given = site(op, Shape(2, rows, width), dtype)
        for left_out in ((), ("weight", "x_weight"), ("gate", "scale", "shift")):
            some = {name: t for name, t in given.items() if name not in left_out}
            got, cotangents = fused(op, some, "eager")
            for a, b in zip(got, unfused(op, some, cotangents), strict=True):
                assert a.is_contiguous()
                assert same_bits(a, b.contiguous()), f"{left_out}: {int((a != b).sum())} of {a.numel()} elements differ"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [3840, 2304, 4096, 136, 24])
def test_a_stream_that_goes_on_gets_the_sum_of_eager_autograd(width: int, dtype: torch.dtype) -> None:
    """Whose three terms are rounded one after the other."""
    given = site("norm_scale_shift", Shape(2, 9, width), dtype)
    dy, dr = torch.randn(2, *given["x"].shape).to(given["x"])

    def gradient(y: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((y, given["x"] * 1), given["x"], (dy, dr))
        return found

    got = gradient(run("norm_scale_shift", given, "eager")[0])
    if MODE == "cpu_sim":
        d = dy * (1 + given["scale"])
        expected = aten_replay.diffusers_rms_norm_backward(d, given["x"].detach(), given["weight"], EPS, dr)
    else:
        expected = gradient(expression("norm_scale_shift", given, "eager")[0])
    assert same_bits(got, expected)


def exact(op: str, given: dict[str, Any], cotangents: Sequence[Tensor], stored: Tensor | None) -> list[Tensor]:
    """In float64; the norm reads ``stored``, the rounded sum."""
    wide = {name: t.detach().double() if t.is_floating_point() else t for name, t in given.items()}
    for name, t in given.items():
        if t.requires_grad:
            wide[name].requires_grad_()
    doubles = [c.double() for c in cotangents]
    if stored is None:
        return list(torch.autograd.grad(expression(op, wide, "single"), wanted(wide), doubles))
    r = stored.double().requires_grad_()
    of_norm = {name: t for name, t in wide.items() if name in ("scale", "shift", "weight", "index")} | {"x": r}
    if of_norm.get("scale") is None and of_norm.get("shift") is None:
        of_norm.pop("index", None)
    inputs = [r, *(wide[name] for name in ("scale", "shift", "weight") if name in wide and wide[name].requires_grad)]
    found = torch.autograd.grad(expression("norm_scale_shift", of_norm, "single"), inputs, doubles[0])
    of_sum = {name: t for name, t in wide.items() if name in ("residual", "x", "x_weight", "gate", "index")}
    before = "norm_scale_residual" if op.startswith("norm") else "scale_residual"
    sums = torch.autograd.grad(expression(before, of_sum, "single"), wanted(of_sum), doubles[1] + found[0])
    return [*sums, *found[1:]]


def close(got: Tensor, expected: Tensor, roundings: int) -> None:
    bound = roundings * torch.finfo(got.dtype).eps / 2 + 2.0**-24 * 10 * got.shape[-1] ** 0.5
    assert got.isfinite().all()
    assert (got.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *VIEWS, *ROWS])
@pytest.mark.parametrize("op", SITES)
def test_gradients_against_float64(op: str, layout: str, rounding: str) -> None:
    """Of all layouts of modulations, and with everything trained."""
    for dtype in FLOATS:
        for width in (24, 136, 1160):
            shape = Shape(2, 6, width, frames=2, rows=3)
            given = site(op, shape, dtype, layout)
            for trained in (False, True) if width == 136 else (True,):
                if trained:
                    given |= {name: given[name].detach().requires_grad_() for name in SITES[op]}
                outputs = run(op, given, rounding)
                got, cotangents = fused(op, given, rounding)
                stored = outputs[1].detach() if len(outputs) == 2 else None
                for a, b in zip(got, exact(op, given, cotangents, stored), strict=True):
                    close(a, b, 3 if rounding == "single" else 12)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", X_LAYOUTS)
@pytest.mark.parametrize("op", SITES)
def test_rows_and_their_gradients_may_have_any_strides(op: str, layout: str) -> None:
    shape = Shape(2, 9, 136)
    given = site(op, shape, torch.bfloat16, rows=layout)
    dense = given | {name: given[name].detach().contiguous().requires_grad_() for name in ROW_NAMES if name in given}
    expected, cotangents = fused(op, dense, "eager")
    strided = [torch.cat([c, c], dim=-1)[..., : c.shape[-1]] for c in cotangents]
    for a, b in zip(fused(op, given, "eager", strided)[0], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", SITES)
def test_a_rows_gradient_depends_on_no_other_row_and_is_the_same_again(op: str) -> None:
    given = site(op, Shape(1, 32, 1160), torch.bfloat16)
    first, cotangents = fused(op, given, "eager")
    assert all(torch.equal(a, b) for a, b in zip(fused(op, given, "eager", cotangents)[0], first, strict=True))
    for name in ROW_NAMES:
        if name in given:
            with torch.no_grad():
                given[name][:, 3] = float("nan")
    for a, b in zip(fused(op, given, "eager", cotangents)[0], first, strict=True):
        kept = [i for i in range(32) if i != 3]
        assert torch.equal(a[:, kept], b[:, kept])
        if op != "norm_scale_residual":
            assert a[:, 3].isnan().all()


@pytest.mark.parametrize("op", SITES)
def test_without_rows_there_is_nothing_to_do(op: str) -> None:
    for shape in (Shape(2, 0, 64), Shape(0, 5, 64)):
        got, _ = fused(op, site(op, shape, torch.bfloat16), "eager")
        assert all(t.shape == (shape.batch, shape.tokens, 64) for t in got)


@pytest.mark.parametrize("op", SITES)
@pytest.mark.parametrize("width", [136, 3840])
def test_only_what_is_wanted_is_made(width: int, op: str) -> None:
    """And one of two results may be unused."""
    given = site(op, Shape(2, 6, width), torch.bfloat16)
    both, cotangents = fused(op, given, "eager")
    if op != "norm_scale_shift":
        for kept in ROW_NAMES:
            some = given | {name: given[name].detach() for name in ROW_NAMES if name != kept}
            assert torch.equal(fused(op, some, "eager", cotangents)[0][0], both[ROW_NAMES.index(kept)])
    outputs = run(op, given, "eager")
    for i, output in enumerate(outputs if len(outputs) == 2 else ()):
        zeros = [c if i == j else torch.zeros_like(c) for j, c in enumerate(cotangents)]
        alone = torch.autograd.grad(output, wanted(given), cotangents[i], retain_graph=True)
        for a, b in zip(alone, torch.autograd.grad(outputs, wanted(given), zeros, retain_graph=True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", SITES)
def test_second_gradients_are_those_of_the_expression(op: str) -> None:
    given = site(op, Shape(1, 4, 24), torch.float32)
    given |= {name: given[name].detach().requires_grad_() for name in SITES[op]}

    def penalty(outputs: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad([o.square().sum() for o in outputs], wanted(given), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in found), wanted(given)))  # type: ignore[arg-type]

    for a, b in zip(penalty(run(op, given, "single")), penalty(expression(op, given, "single")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
