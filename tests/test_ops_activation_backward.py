"""The gradients of GELU and SwiGLU written behind what the next linear layer reads beside them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import DEVICE, FLOATS, MODE, compiled_only
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import gelu, swiglu
from ditnorm.ops.table import OPS

pytestmark = compiled_only

SHAPES = (((2, 3, 512), 128), ((1, 5, 3072), 1024), ((4, 1032), 40), ((1, 1, 8), 8), ((2, 3, 13), 5), ((3, 1), 1), ((2, 0, 64), 64))
UNIT = 2.0**-24


def leaves(shape: tuple[int, ...], width: int, dtype: torch.dtype, gated: bool, strided: bool = False) -> dict[str, Tensor]:
    def random(last: int) -> Tensor:
        made = (2 * torch.randn(*shape[:-1], 3 * last + 16 if strided else last)).to(dtype).to(DEVICE)
        return (made[..., last + 16 : 2 * last + 16] if strided else made).detach().requires_grad_()

    names = {"x": shape[-1]} | ({"value": shape[-1]} if gated else {}) | ({"beside": width} if width else {})
    return {name: random(last) for name, last in names.items()}


def call(given: dict[str, Tensor], rounding: str) -> Tensor:
    return (swiglu if "value" in given else gelu)(**given, rounding=rounding)


def upstream(given: dict[str, Tensor]) -> Tensor:
    y = F.silu(given["x"]) * given["value"] if "value" in given else F.gelu(given["x"], approximate="tanh")
    return torch.cat([given["beside"], y], dim=-1) if "beside" in given else y


def fused(given: dict[str, Tensor], rounding: str, dy: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients, which kernels have made, by name, and the cotangent they came from."""
    before = kernels.counts()
    y = call(given, rounding)
    dy = torch.randn(y.shape).to(y) if dy is None else dy
    names = [name for name, t in given.items() if t.requires_grad]
    found = torch.autograd.grad(y, [given[name] for name in names], dy)
    assert not [key for key, n in kernels.counts().items() if n != before[key] and key[1] == "reference"]
    return dict(zip(names, found, strict=True)), dy


@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_against_float64(dtype: torch.dtype, gated: bool, rounding: str) -> None:
    """And what stood beside gets back what was written there."""
    for shape, width in SHAPES:
        for beside in (width, 0):
            given = leaves(shape, beside, dtype, gated, strided=beside == 0)
            got, dy = fused(given, rounding)
            wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
            expected = torch.autograd.grad(upstream(wide), list(wide.values()), dy.double())
            roundings = 3 if rounding == "eager" else 1
            for (name, a), b in zip(got.items(), expected, strict=True):
                bound = (roundings * torch.finfo(dtype).eps / 2 + 16 * UNIT) * b.norm() + 1e-6
                assert (a.double() - b).norm() <= bound, (shape, name)
            if beside:
                assert torch.equal(got["beside"], dy[..., :beside])


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_eager_gradients_have_the_bits_of_autograd(dtype: torch.dtype, gated: bool) -> None:
    """On a GPU; the exponential of a host build is another library's."""
    for shape, width in (*SHAPES, *([((4, 1024, 3072), 1024)] if MODE == "cuda" else [])):
        given = leaves(shape, width, dtype, gated)
        got, dy = fused(given, "eager")
        for a, b in zip(got.values(), torch.autograd.grad(upstream(given), list(given.values()), dy), strict=True):
            if MODE == "cuda":
                assert torch.equal(a, b)
            elif dtype is not torch.float32:
                assert (a != b).sum() <= 0.02 * a.numel() + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_has_the_gradients_of_autograd(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype).view(-1, 64)
    for value in (1.0, -0.37, 3.14e4, 6.1e-5):
        given = {"x": every.clone().requires_grad_(), "value": torch.full_like(every, value).requires_grad_()}
        got, dy = fused(given, "eager")
        for a, b in zip(got.values(), torch.autograd.grad(upstream(given), list(given.values()), dy), strict=True):
            assert torch.equal(a.nan_to_num(-1.0).view(torch.int16), b.nan_to_num(-1.0).view(torch.int16))


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_rows_are_alone_and_results_the_same_again(gated: bool) -> None:
    given = leaves((16, 1032), 40, torch.bfloat16, gated)
    first, dy = fused(given, "eager")
    again, _ = fused(given, "eager", dy)
    assert all(torch.equal(again[name], first[name]) for name in first)
    with torch.no_grad():
        given["x"][3] = float("nan")
    kept = [i for i in range(16) if i != 3]
    changed, _ = fused(given, "eager", dy)
    assert all(torch.equal(changed[name][kept], first[name][kept]) for name in first)
    assert changed["x"][3].isnan().all()


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_only_what_is_wanted_is_made(gated: bool) -> None:
    given = leaves((2, 5, 64), 24, torch.bfloat16, gated)
    every, dy = fused(given, "eager")
    for kept in given:
        some = {name: t if name == kept else t.detach() for name, t in given.items()}
        got, _ = fused(some, "eager", dy)
        assert list(got) == [kept]
        assert torch.equal(got[kept], every[kept])


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_what_is_saved_is_what_was_given(gated: bool) -> None:
    """Not SiLU's result, nor what stands beside."""
    given = leaves((2, 5, 64), 24, torch.bfloat16, gated)
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        call(given, "eager")
    assert set(saved) == {given[name].data_ptr() for name in ("x", "value") if name in given}


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_second_gradients_are_those_of_the_expression(gated: bool, rounding: str) -> None:
    given = leaves((2, 3, 16), 8, torch.float32, gated)

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(y.square().sum(), list(given.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in found), list(given.values()))  # type: ignore[arg-type,call-overload,no-any-return]

    for a, b in zip(penalty(call(given, rounding)), penalty(upstream(given)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_opcheck() -> None:
    given = leaves((2, 3, 64), 0, torch.bfloat16, gated=True)
    arguments = (torch.randn(2, 3, 64).to(given["x"]), given["x"].detach(), given["value"].detach(), 1)
    torch.library.opcheck(torch.ops.ditnorm.swiglu_backward.default, arguments)
    assert OPS["swiglu_backward"].named(arguments).rounding == "eager"
