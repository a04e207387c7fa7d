"""Rotary embeddings of the halves of a head, with tables for each head, and for query and key
apart.
"""

import random
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb
from support.cases import DEVICE, FLOATS, MODE, UNIT, compiled_only, half_ulp, poison
from support.qk_cases import EPS, normal, stream
from support.qk_expressions import diffusers_rms_norm, ltx2_rotary, torch_rms_norm
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import qk_norm_rope
from ditnorm.ops.options import PAIRS
from ditnorm.ops.table import OPS as TABLE

Tables = tuple[Tensor, Tensor]

# Head, heads: of LTX-2's video and audio, of narrow rows, of heads that no fast kernel serves.
FORMS = [(128, 32), (64, 32), (64, 2), (32, 2), (128, 1), (8, 3), (256, 2), (40, 3), (96, 4)]


def same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype is expected.dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    differ = got.view(torch.uint8) != expected.contiguous().view(torch.uint8)
    assert not differ.any(), f"{int((got != expected).sum())} of {got.numel()} elements differ"


def tables(tokens: int, heads: int, head_dim: int, batch: int = 2, pairs: str = "halves") -> Tables:
    """[B, S, H, d / 2] as LTX-2's models pass them, but for their order of dims; of neighbours [B,
    S, H, d].
    """
    angles = torch.randn(batch, tokens, heads, head_dim // 2) * 3
    if pairs == "neighbours":
        angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def as_upstream(x: Tensor, weight: Tensor, rotary: Tables | None, head_dim: int, norm: str = "rms", pairs: str = "halves") -> Tensor:
    normed = torch_rms_norm if norm == "rms" else diffusers_rms_norm
    across = weight.numel() != head_dim
    n = normed(x, weight, EPS).unflatten(2, (-1, head_dim)) if across else normed(x.unflatten(2, (-1, head_dim)), weight, EPS)
    return n if rotary is None else ltx2_rotary(n, rotary, pairs)


@pytest.mark.parametrize("own_tables", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_dim", "heads"), FORMS)
def test_eager_keeps_every_bit_of_upstream(head_dim: int, heads: int, dtype: torch.dtype, own_tables: bool) -> None:
    torch.manual_seed(0)
    lengths = (7, 5) if own_tables else (6, 6)
    query, key = (stream(2, s, heads, head_dim, dtype, layout) for s, layout in zip(lengths, ("contiguous", "chunk"), strict=True))
    weights = [normal(heads * head_dim, dtype=dtype, mean=1.0, std=0.3) for _ in range(2)]
    rotary = tables(lengths[0], heads, head_dim)
    key_rotary = tables(lengths[1], heads, head_dim) if own_tables else None
    options: dict[str, Any] = {"head_dim": head_dim, "norm": "rms" if heads > 1 else "diffusers_rms", "eps": EPS, "rounding": "eager"}
    poison(query)
    got = qk_norm_rope(query, key, *weights, rotary, key_rotary=key_rotary, pairs="halves", **options)
    for result, x, weight, used in zip(got, (query, key), weights, (rotary, key_rotary or rotary), strict=True):
        same_bits(result, as_upstream(x, weight, used, head_dim, options["norm"]))


@pytest.mark.parametrize("norm", ["rms", "diffusers_rms"])
@pytest.mark.parametrize("head_dim", [128, 40])
def test_norms_of_each_head_go_with_it(head_dim: int, norm: str) -> None:
    query, key = (stream(2, 5, 3, head_dim, torch.bfloat16) for _ in range(2))
    weight, rotary = normal(head_dim, dtype=torch.bfloat16, mean=1.0, std=0.3), tables(5, 3, head_dim)
    got = qk_norm_rope(query, key, weight, weight, rotary, head_dim=head_dim, norm=norm, eps=EPS, pairs="halves", rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, rotary, head_dim, norm))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_dim", "heads"), [(128, 32), (64, 2), (40, 3)])
def test_neighbours_have_tables_for_each_head_too(head_dim: int, heads: int, dtype: torch.dtype) -> None:
    query, key = (stream(2, 5, heads, head_dim, dtype) for _ in range(2))
    weight, rotary = normal(heads * head_dim, dtype=dtype, mean=1.0, std=0.3), tables(5, heads, head_dim, pairs="neighbours")
    got = qk_norm_rope(query, key, weight, weight, rotary, head_dim=head_dim, eps=EPS, rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, rotary, head_dim, pairs="neighbours"))


@pytest.mark.parametrize("form", ["unaligned", "strided", "of one sample", "shared by heads", "without dims"])
def test_tables_lie_in_memory_as_they_like(form: str) -> None:
    heads, head_dim = 32, 64
    query, key = (stream(2, 5, heads, head_dim, torch.bfloat16) for _ in range(2))
    weight = normal(heads * head_dim, dtype=torch.bfloat16, mean=1.0, std=0.3)
    cos, sin = tables(5, heads, head_dim, batch=1 if form != "unaligned" else 2)
    if form == "unaligned":
        cos, sin = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (cos, sin))
    elif form == "strided":
        cos, sin = (torch.stack([t, t], dim=-1).flatten(-2)[..., ::2] for t in (cos, sin))
    elif form != "of one sample":
        cos, sin = cos[:, :, :1], sin[:, :, :1]
    whole = tuple(t.expand(2, -1, heads, -1).contiguous() for t in (cos, sin))
    given = (cos[0, :, 0], sin[0, :, 0]) if form == "without dims" else (cos, sin)
    options: dict[str, Any] = {"head_dim": head_dim, "eps": EPS, "pairs": "halves", "rounding": "eager"}
    got = qk_norm_rope(query, key, weight, weight, given, **options)
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, (whole[0], whole[1]), head_dim))


def test_only_the_leading_tokens_are_rotated() -> None:
    query, key = (stream(2, 7, 32, 64, torch.bfloat16) for _ in range(2))
    weight, rotary = normal(2048, dtype=torch.bfloat16), tables(4, 32, 64)
    for result, x in zip(
        qk_norm_rope(query, key, weight, weight, rotary, head_dim=64, eps=EPS, pairs="halves", rounding="eager"), (query, key), strict=True
    ):
        same_bits(result[:, :4].contiguous(), as_upstream(x[:, :4], weight, rotary, 64))
        same_bits(result[:, 4:].contiguous(), as_upstream(x[:, 4:], weight, None, 64))


@compiled_only
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_dim", "heads"), [(128, 32), (40, 3)])
def test_the_law_of_older_releases_rounds_the_product(head_dim: int, heads: int, dtype: torch.dtype) -> None:
    query, key = (stream(2, 5, heads, head_dim, dtype) for _ in range(2))
    weight, (cos, sin) = normal(heads * head_dim, dtype=dtype, mean=1.0, std=0.3), tables(5, heads, head_dim)
    got = kernels.ops.qk_norm_rope(query, key, weight, weight, cos, sin, None, None, head_dim, 0, EPS, PAIRS.index("halves, rounded"), 1)
    for result, x in zip(got, (query, key), strict=True):
        first, second = as_upstream(x, weight, None, head_dim).float().chunk(2, dim=-1)
        same_bits(result, torch.cat([first * cos - sin * second, second * cos + sin * first], dim=-1).to(dtype))


def exact(x: Tensor, weight: Tensor, rotary: Tables, head_dim: int) -> tuple[Tensor, Tensor]:
    """The result in float64 with a bound on the error of float32 arithmetic: see
    ``test_ops_qk_norm_rope``.
    """
    v = x.double()
    n = v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    slack = n.abs() * UNIT * ((v.shape[-1] / 32 + 16) / 2 + 5)
    n, slack = (t.unflatten(2, (-1, head_dim)) for t in (n, slack))
    cos, sin = (t.double() for t in rotary)
    (a, b), (slack_a, slack_b) = n.chunk(2, dim=-1), slack.chunk(2, dim=-1)
    size = torch.cat([a.abs() * cos.abs() + b.abs() * sin.abs(), b.abs() * cos.abs() + a.abs() * sin.abs()], dim=-1)
    bound = torch.cat([slack_a * cos.abs() + slack_b * sin.abs(), slack_b * cos.abs() + slack_a * sin.abs()], dim=-1) + 2 * UNIT * size
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1), bound


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(20))
def test_single_is_the_exact_result_rounded_once(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    (head_dim, heads), dtype = rng.choice([form for form in FORMS if form[1] > 1]), rng.choice(FLOATS)
    layouts = ("contiguous", "chunk", "unaligned", "channel_strided")
    query, key = (stream(2, 5, heads, head_dim, dtype, rng.choice(layouts)) for _ in range(2))
    weights = [normal(heads * head_dim, dtype=rng.choice((dtype, torch.float32)), mean=1.0, std=0.3) for _ in range(2)]
    rotary, key_rotary = (tables(5, heads, head_dim, rng.choice((1, 2))) for _ in range(2))
    got = qk_norm_rope(query, key, *weights, rotary, key_rotary=key_rotary, head_dim=head_dim, eps=EPS, pairs="halves")
    for result, x, weight, used in zip(got, (query, key), weights, (rotary, key_rotary), strict=True):
        value, slack = exact(x, weight, used, head_dim)
        error, bound = (result.double() - value).abs(), half_ulp(value.abs() + slack, dtype) + slack
        assert bool((error <= bound).all()), f"{int((error > bound).sum())} of {error.numel()} elements are off"


@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("head_dim", "heads"), [(128, 32), (64, 2), (40, 3)])
def test_gradients_are_those_of_upstream(head_dim: int, heads: int, dtype: torch.dtype, rounding: str) -> None:
    """Of the rows, which kernels make; bit for bit where upstream's are made on a GPU, too."""
    torch.manual_seed(3)
    inputs = [stream(2, s, heads, head_dim, dtype).requires_grad_() for s in (7, 5)]
    weights = [normal(heads * head_dim, dtype=dtype, mean=1.0, std=0.3) for _ in range(2)]
    rotary, key_rotary = tables(7, heads, head_dim), tables(5, heads, head_dim)
    options: dict[str, Any] = {"key_rotary": key_rotary, "head_dim": head_dim, "eps": EPS, "pairs": "halves", "rounding": rounding}
    before = kernels.counts()
    results = qk_norm_rope(*inputs, *weights, rotary, **options)
    cotangents = [normal(*result.shape, dtype=dtype) for result in results]
    got = torch.autograd.grad(results, inputs, cotangents)
    if MODE != "reference":
        assert not [op for op, n in kernels.counts().items() if n != before[op] and op[1] == "reference"]
    for gradient, x, weight, used, cotangent in zip(got, inputs, weights, (rotary, key_rotary), cotangents, strict=True):
        wide = x.detach().double().requires_grad_()
        n = torch.nn.functional.rms_norm(wide, wide.shape[-1:], weight.double(), EPS).unflatten(2, (-1, head_dim))
        (a, b), (cos, sin) = n.chunk(2, dim=-1), (t.double() for t in used)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        (expected,) = torch.autograd.grad(turned, wide, cotangent.double())
        bound = (6 if rounding == "eager" else 1) * torch.finfo(dtype).eps / 2 + UNIT * 10 * x.shape[-1] ** 0.5
        assert (gradient.double() - expected).norm() <= bound * expected.norm()
        if MODE == "cuda" and rounding == "eager":
            (wanted,) = torch.autograd.grad(as_upstream(x, weight, used, head_dim), x, cotangent)
            assert torch.equal(gradient, wanted)


def test_gradients_of_tables_and_weights_are_those_of_upstream() -> None:
    inputs = [stream(2, 4, 2, 16, torch.float32).requires_grad_() for _ in range(2)]
    weights = [normal(32, mean=1.0).requires_grad_() for _ in range(2)]
    rotary, key_rotary = (tuple(t.requires_grad_() for t in tables(4, 2, 16)) for _ in range(2))
    wanted = [*inputs, *weights, *rotary, *key_rotary]
    results = qk_norm_rope(*inputs, *weights, rotary, key_rotary=key_rotary, head_dim=16, eps=EPS, pairs="halves", rounding="eager")
    upstream = []
    for x, weight, (cos, sin) in zip(inputs, weights, (rotary, key_rotary), strict=True):
        n = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
        turned = apply_split_rotary_emb(n, (cos.transpose(1, 2), sin.transpose(1, 2)))
        upstream.append(turned.unflatten(2, (-1, 16)))
    cotangents = [torch.randn_like(result) for result in upstream]
    for a, b in zip(torch.autograd.grad(results, wanted, cotangents), torch.autograd.grad(upstream, wanted, cotangents), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pairs": "thirds"}, ValueError, "pairs: expected one of 'neighbours', 'halves'"),
        ({"rotary": None}, ValueError, "key_rotary: given without rotary"),
        ({"key_rotary": torch.zeros(4, 8)}, TypeError, "key_rotary: expected a complex Tensor"),
        ({"key_rotary": (torch.zeros(4, 8),)}, TypeError, "key_rotary: expected None, a complex Tensor or a pair"),
        ({"key_rotary": (torch.zeros(5, 8), torch.zeros(5, 8))}, ValueError, "key_rotary: got .* S at most 4"),
        ({"key_rotary": (torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8))}, ValueError, "key_rotary: got .* 1 or 2, n"),
        ({"rotary": (torch.zeros(3, 16), torch.zeros(3, 16))}, ValueError, r'rotary: with pairs="halves" expected \(cos, sin\) of width 8'),
        ({"rotary": torch.zeros(3, 8, dtype=torch.complex64)}, ValueError, 'rotary: with pairs="halves" expected'),
        ({"rotary": (torch.zeros(2, 3, 3, 8), torch.zeros(2, 3, 3, 8))}, ValueError, "rotary: got .* 1 or 2, n"),
        ({"key_rotary": (torch.zeros(4, 8, device="meta"),) * 2}, ValueError, "key_rotary: expected the device of query"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"query": torch.zeros(2, 3, 32), "key": torch.zeros(2, 4, 32), "head_dim": 16, "pairs": "halves"}
    call |= {"rotary": (torch.zeros(3, 8), torch.zeros(3, 8)), "key_rotary": (torch.zeros(4, 8), torch.zeros(4, 8))}

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(moved(v) for v in value)
        return value.to(DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value

    with pytest.raises(error, match=message):
        qk_norm_rope(**{name: moved(value) for name, value in (call | changes).items()})


@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_compiles_without_a_graph_break(rounding: str) -> None:
    query, key = (stream(1, s, 2, 16, torch.float32) for s in (6, 4))
    weight, rotary, key_rotary = normal(32), tables(6, 2, 16, 1), tables(4, 2, 16, 1)

    def function(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(q * 2, k, weight, weight, rotary, key_rotary=key_rotary, head_dim=16, pairs="halves", rounding=rounding)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(query, key), function(query, key), strict=True):
        same_bits(a, b)


def test_opcheck() -> None:
    query, key = (stream(2, s, 2, 16, torch.float32) for s in (4, 3))
    weight = normal(32)
    arguments = (query, key, weight, weight, *tables(4, 2, 16), *tables(3, 2, 16), 16, 0, EPS, 1, 1)
    torch.library.opcheck(kernels.ops.qk_norm_rope.default, arguments)


@pytest.mark.skipif(MODE != "cuda", reason="ATen's order on CUDA")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [128, 64])
def test_many_random_rows_keep_every_bit(head_dim: int, dtype: torch.dtype) -> None:
    # A product that is rounded before it is added changes about one bf16 element in a thousand.
    query, key = (stream(2, 1024, 32, head_dim, dtype) for _ in range(2))
    weight, rotary = normal(32 * head_dim, dtype=dtype, mean=1.0, std=0.3), tables(1024, 32, head_dim)
    got = qk_norm_rope(query, key, weight, weight, rotary, head_dim=head_dim, eps=EPS, pairs="halves", rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, rotary, head_dim))
        assert torch.equal(
            result, TABLE["qk_norm_rope"].expression(x, x, weight, weight, *rotary, None, None, head_dim, "rms", EPS, "halves", "eager")[0]
        )
