"""The kernels that make the gradients of query and key: their bits and their accuracy."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.cases import FLOATS, MODE, UNIT, compiled_only
from support.qk_cases import EPS, HALVES, HEAD_DIMS, LAYOUTS, ROTARY, as_upstream, normal, rotary_tables, stream
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import joint_qk_norm_rope, qk_norm_rope
from ditnorm.ops.bits import same_bits
from ditnorm.ops.table import OPS as TABLE

pytestmark = compiled_only

# The norm, the head, how many heads.
FORMS = [("diffusers_rms", head_dim, 3) for head_dim in HEAD_DIMS] + [("diffusers_rms", 128, 24)]
FORMS += [("rms", head_dim, heads) for head_dim, heads in ((128, 12), (128, 24), (128, 40), (128, 16), (64, 5), (8, 3))]
FORMS += [("rms per head", head_dim, 3) for head_dim in (128, 64, 256, 96)]


def fused(call: dict[str, Any], cotangents: Sequence[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of query and key, which kernels have made, and the cotangents that they came
    from.
    """
    before = kernels.counts()
    outputs = qk_norm_rope(**call)
    cotangents = [normal(*o.shape, dtype=o.dtype) for o in outputs] if cotangents is None else list(cotangents)
    gradients = list(torch.autograd.grad(outputs, [call["query"], call["key"]], cotangents))
    assert not [key for key, n in kernels.counts().items() if n != before[key] and key[1] == "reference"]
    return gradients, cotangents


def rows(form: tuple[str, int, int], dtype: torch.dtype, kind: str | None, tokens: int = 6, layout: str = "contiguous") -> dict[str, Any]:
    norm, head_dim, heads = form
    width = heads * head_dim if norm == "rms" else head_dim
    norm = norm.removesuffix(" per head")
    query, key = (stream(2, tokens, heads, head_dim, dtype, layout).detach().requires_grad_() for _ in range(2))
    weights = {f"{name}_weight": normal(width, dtype=dtype, mean=1.0, std=0.3) for name in ("query", "key")}
    rotary = rotary_tables(kind, tokens - 1, head_dim)
    return {"query": query, "key": key, **weights, "rotary": rotary, "head_dim": head_dim, "norm": norm, "eps": EPS}


@pytest.mark.skipif(MODE != "cuda", reason="autograd's kernels on the CPU have other bits")
@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_eager_gradients_have_the_bits_of_autograd(form: tuple[str, int, int], dtype: torch.dtype, kind: str | None) -> None:
    _, head_dim, _ = form
    call = rows(form, dtype, kind, tokens=257)
    got, cotangents = fused(call | {"rounding": "eager"})
    outputs = [as_upstream(call[name], call[f"{name}_weight"], kind, call["rotary"], head_dim, call["norm"]) for name in ("query", "key")]
    wanted = torch.autograd.grad(outputs, [call["query"], call["key"]], cotangents)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} elements differ"


def off_the_grid(t: Tensor) -> Tensor:
    """The same numbers where no wide access starts, so that the generic kernel takes them."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("heads", [12, 24, 40, 16])
def test_eager_gradients_across_heads_have_the_bits_of_the_generic_kernel(heads: int, kind: str | None) -> None:
    """With rows of zeros, of numbers near both ends of the range, of NaN and of infinity."""
    call = rows(("rms", 128, heads), torch.bfloat16, kind, tokens=8) | {"rounding": "eager"}
    scales = torch.tensor([1, 0, -0.0, 1e-38, 1e-20, 1e20, 1, 1], device=call["query"].device).bfloat16()[:, None]
    with torch.no_grad():
        call["query"] *= scales
        call["query"][0, 6, 5], call["query"][0, 7, 9] = math.nan, math.inf
        cotangents = [normal(*t.shape, dtype=t.dtype).unflatten(2, (heads, 128)) for t in (call["query"], call["key"])]
        cotangents[1] *= scales[..., None].flip(0)
    moved = call | {name: off_the_grid(call[name].detach()).requires_grad_() for name in ("query", "key")}
    expected, _ = fused(moved, [off_the_grid(c) for c in cotangents])
    for a, b in zip(fused(call, cotangents)[0], expected, strict=True):
        assert same_bits(a, b)


def exact(call: dict[str, Any], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
    cos, sin = (call["rotary"], None) if call["rotary"] is None or isinstance(call["rotary"], Tensor) else call["rotary"]
    wide = {name: t.detach().double() for name, t in call.items() if isinstance(t, Tensor) and t.is_floating_point()}
    inputs = [wide[name].requires_grad_() for name in ("query", "key")]
    weights = (wide.get("query_weight"), wide.get("key_weight"))
    outputs = TABLE["qk_norm_rope"].expression(
        *inputs, *weights, cos, sin, None, None, call["head_dim"], call["norm"], EPS, "neighbours", "single"
    )
    return torch.autograd.grad(outputs, inputs, [c.double() for c in cotangents])


def close(got: Tensor, expected: Tensor, roundings: int) -> None:
    bound = roundings * torch.finfo(got.dtype).eps / 2 + UNIT * 10 * got.shape[-1] ** 0.5
    assert got.isfinite().all()
    assert (got.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_against_float64(form: tuple[str, int, int], kind: str | None, rounding: str) -> None:
    for dtype in FLOATS:
        call = rows(form, dtype, kind) | {"rounding": rounding}
        got, cotangents = fused(call)
        for a, b in zip(got, exact(call, cotangents), strict=True):
            close(a, b, 1 if rounding == "single" else 6)


@pytest.mark.parametrize("head_dim", [128, 40])
@pytest.mark.parametrize("norm", ["rms", "diffusers_rms"])
def test_gradients_of_single_without_a_weight(norm: str, head_dim: int) -> None:
    for dtype in FLOATS:
        call = rows((norm, head_dim, 3), dtype, "complex")
        call |= {"query_weight": None, "key_weight": None}
        got, cotangents = fused(call)
        for a, b in zip(got, exact(call, cotangents), strict=True):
            close(a, b, 1)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_their_gradients_may_have_any_strides(layout: str) -> None:
    for form in (("diffusers_rms", 128, 3), ("rms", 128, 12)):
        call = rows(form, torch.bfloat16, "complex", layout=layout) | {"rounding": "eager"}
        cotangents = [stream(2, 6, form[2], form[1], torch.bfloat16, layout).unflatten(2, (-1, form[1])) for _ in range(2)]
        by_head = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in cotangents]  # as attention's backward may leave it
        dense = call | {name: call[name].detach().contiguous().requires_grad_() for name in ("query", "key")}
        expected, _ = fused(dense, [c.contiguous() for c in cotangents])
        for some in (cotangents, by_head):
            for a, b in zip(fused(call, some)[0], expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("encoder_first", [False, True])
@pytest.mark.parametrize("kind", ROTARY)
def test_gradients_of_two_joined_streams_are_those_of_each(kind: str | None, encoder_first: bool, rounding: str) -> None:
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.float32, 64), (torch.float16, 40)):
        own, encoder = ([stream(2, s, 3, head_dim, dtype).requires_grad_() for _ in range(3)] for s in (5, 3))
        weight, rotary, encoder_rotary = normal(head_dim, dtype=dtype), rotary_tables(kind, 5, head_dim), rotary_tables(kind, 2, head_dim)
        options: dict[str, Any] = {"head_dim": head_dim, "norm": "diffusers_rms", "rounding": rounding}
        before = kernels.counts()
        joined = joint_qk_norm_rope(
            *own, weight, weight, rotary, *encoder, weight, weight, encoder_rotary, encoder_first=encoder_first, **options
        )
        cotangents = [normal(*t.shape, dtype=dtype) for t in joined]
        got = torch.autograd.grad(joined, [*own, *encoder], cotangents)
        assert not [key for key, n in kernels.counts().items() if n != before[key] and key[1] == "reference"]
        parts = [c.split((3, 5) if encoder_first else (5, 3), dim=1)[:: -1 if encoder_first else 1] for c in cotangents]
        for i, (streams, tables) in enumerate(((own, rotary), (encoder, encoder_rotary))):
            alone = qk_norm_rope(*streams[:2], weight, weight, tables, **options)
            expected = torch.autograd.grad(alone, streams[:2], [part[i] for part in parts[:2]])
            for a, b in zip(got[3 * i : 3 * i + 2], expected, strict=True):
                assert torch.equal(a, b)
            assert torch.equal(got[3 * i + 2], parts[2][i].flatten(2))


@pytest.mark.parametrize(("batch", "tokens", "text_tokens"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 0, 0)])
def test_empty_streams_have_empty_gradients(batch: int, tokens: int, text_tokens: int) -> None:
    image, text = ([stream(batch, n, 3, 16, torch.bfloat16).requires_grad_() for _ in range(3)] for n in (tokens, text_tokens))
    weights = [normal(16, dtype=torch.bfloat16).requires_grad_() for _ in range(4)]
    tables = rotary_tables("per_element", tokens, 16)
    joint = joint_qk_norm_rope(*image, *weights[:2], tables, *text, *weights[2:], None, head_dim=16, norm="diffusers_rms", rounding="eager")
    alone = qk_norm_rope(*image[:2], *weights[:2], tables, head_dim=16, norm="diffusers_rms", rounding="eager")
    wanted = [*image, *text, *weights]
    found = torch.autograd.grad([*joint, *alone], wanted, [torch.ones_like(result) for result in (*joint, *alone)])
    assert [gradient.shape for gradient in found] == [t.shape for t in wanted]
    assert all(gradient.isfinite().all() for gradient in found)


def test_one_result_may_be_unused() -> None:
    call = rows(("diffusers_rms", 64, 3), torch.float32, "per_pair")
    query, _ = qk_norm_rope(**call)
    cotangent = torch.randn_like(query)
    of_query, of_key = torch.autograd.grad(query, [call["query"], call["key"]], cotangent)
    close(of_query, exact(call, [cotangent, torch.zeros_like(cotangent)])[0], 1)
    assert not of_key.any()


@pytest.mark.sanitize
def test_a_rows_gradient_depends_on_no_other_row_and_is_the_same_again() -> None:
    for form in (("diffusers_rms", 128, 24), ("rms", 128, 12), ("diffusers_rms", 40, 3)):
        for dtype in (torch.float32, *HALVES):
            call = rows(form, dtype, "complex")
            whole, cotangents = fused(call)
            for a, b in zip(fused(call, cotangents)[0], whole, strict=True):
                assert torch.equal(a, b)
            part = call | {name: call[name].detach()[1:2].requires_grad_() for name in ("query", "key")}
            for a, b in zip(fused(part, [c[1:2] for c in cotangents])[0], whole, strict=True):
                assert torch.equal(a, b[1:2])


def test_opcheck() -> None:
    call = rows(("diffusers_rms", 64, 3), torch.bfloat16, "complex")
    own = (call["query"].detach(), call["key"].detach(), call["query_weight"], call["key_weight"], call["rotary"], None)
    gradients = [normal(2, 6, 3, 64, dtype=torch.bfloat16) for _ in range(2)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.ops.qk_norm_rope_backward.default, (*gradients, *own, None, None, 64, 1, EPS, 0, 1), test_utils=checks)
    joined = [normal(2, 12, 3, 64, dtype=torch.bfloat16) for _ in range(2)]
    other = tuple(t.clone() if isinstance(t, Tensor) else t for t in own)
    torch.library.opcheck(kernels.ops.joint_qk_norm_rope_backward.default, (*joined, *own, *other, 64, 1, EPS, 1, 1), test_utils=checks)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["complex", "per_pair", "per_element"])
@pytest.mark.parametrize(("rounding", "norm"), [("eager", "diffusers_rms"), ("eager", "rms"), ("single", "rms")])
def test_weights_and_rotary_tables_get_the_gradients_of_the_expression(rounding: str, norm: str, kind: str, trained: bool) -> None:
    head_dim, tokens = 32, 5
    options: dict[str, Any] = {"head_dim": head_dim, "norm": norm, "eps": EPS, "encoder_first": True, "rounding": rounding}
    for dtype in (torch.float32, torch.bfloat16):
        streams = [normal(2, n, 2 * head_dim, dtype=dtype).requires_grad_() for n in (tokens, tokens, tokens, 3, 3, 3)]
        weights = [normal(head_dim, dtype=dtype, mean=1.0, std=0.3).requires_grad_() for _ in range(4)]
        made = rotary_tables(kind, tokens, head_dim)
        tables = [t.detach().requires_grad_(trained) for t in ((made,) if kind == "complex" else made)]
        rotary: Any = tables[0] if kind == "complex" else tuple(tables)
        outputs = joint_qk_norm_rope(*streams[:3], *weights[:2], rotary, *streams[3:], *weights[2:], None, **options)
        both = (*streams[:3], *weights[:2], *(*tables, None)[:2], *streams[3:], *weights[2:], None, None)
        expected = TABLE["joint_qk_norm_rope"].expression(*both, *options.values())
        wanted, cotangents = [*weights, *(tables if trained else [])], [normal(*o.shape, dtype=dtype) for o in outputs[:2]]
        got = torch.autograd.grad(outputs[:2], wanted, cotangents)
        for a, b in zip(got, torch.autograd.grad(expected[:2], wanted, cotangents), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("kind", [*ROTARY, "halves"])
@pytest.mark.parametrize("tokens", [4, 5])
def test_several_gradients_at_once_are_those_of_one_at_a_time(tokens: int, kind: str | None, across: bool, twice: bool) -> None:
    # For torch.autograd.functional.jacobian(vectorize=True), as upstream's attention serves it.
    # With rotary tables of all tokens, or of all but one.
    def normed() -> tuple[list[Tensor], list[Tensor]]:
        streams = [stream(2, 5, 3, 16, torch.float32).requires_grad_() for _ in range(3)]
        return streams, [normal(48 if across else 16).requires_grad_() for _ in range(2)]

    options: dict[str, Any] = {"head_dim": 16, "norm": "diffusers_rms", "rounding": "eager"}
    (image, weights), (text, text_weights) = normed(), normed()
    wanted = [*image[:2], *weights]
    if kind == "halves":
        outputs: Any = qk_norm_rope(*wanted, rotary_tables("per_pair", tokens, 16), pairs="halves", **options)
    else:
        outputs = joint_qk_norm_rope(*image, *weights, rotary_tables(kind, tokens, 16), *text, *text_weights, None, **options)
        wanted += [image[2], *text, *text_weights]
    cotangents = [torch.randn(4, *result.shape, device=result.device) for result in outputs]
    found = torch.autograd.grad(outputs, wanted, cotangents, is_grads_batched=True, retain_graph=True, create_graph=twice)
    for i in range(4):
        one = torch.autograd.grad(outputs, wanted, [cotangent[i] for cotangent in cotangents], retain_graph=True, create_graph=twice)
        for a, b in zip(found, one, strict=True):
            torch.testing.assert_close(a[i], b)  # a sum for the whole batch may have an order of its own
            assert twice or b.dim() == 1 or torch.equal(a[i], b)  # kernels make those of rows, one after the other
