"""QK normalisation with rotary embedding: what it equals, how far it is from the exact result, what
it rejects.
"""

import random
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from support.cases import DEVICE, FLOATS, MODE, UNIT, compiled_only, half_ulp, poison, reference_only
from support.qk_cases import EPS, HALVES, HEAD_DIMS, LAYOUTS, NORMS, ROTARY, as_upstream, normal, rotary_tables, rotate_as_upstream, stream
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import joint_qk_norm_rope, qk_norm_rope
from ditnorm.ops.reference_qk import norm_rope


def same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype is expected.dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    differ = got.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)
    assert not differ.any(), f"{int((got != expected).sum())} of {got.numel()} elements differ"


def eager_cases() -> Any:
    for dtype in FLOATS:
        for kind in ROTARY:
            for head_dim in HEAD_DIMS:
                yield "diffusers_rms", "per_head", head_dim, 3, dtype, kind
                yield "rms", "per_head", head_dim, 3, dtype, kind
            for head_dim, heads in ((40, 75), (96, 32), (136, 15), (504, 6)):  # rows of several blocks, heads that leave threads idle
                yield "diffusers_rms", "per_head", head_dim, heads, dtype, kind
            for head_dim, heads in ((128, 24), (64, 38), (256, 5), (520, 3), (1152, 2)):
                yield "rms", "per_head", head_dim, heads, dtype, kind
            for head_dim, heads in ((128, 12), (128, 40), (64, 5), (8, 3)):
                yield "rms", "across", head_dim, heads, dtype, kind


@pytest.mark.parametrize(("norm", "over", "head_dim", "heads", "dtype", "kind"), list(eager_cases()))
def test_eager_keeps_every_bit_of_upstream(norm: str, over: str, head_dim: int, heads: int, dtype: torch.dtype, kind: str | None) -> None:
    torch.manual_seed(0)
    query, key = (stream(2, 6, heads, head_dim, dtype, layout) for layout in ("contiguous", "chunk"))
    width = head_dim if over == "per_head" else heads * head_dim
    weights = [normal(width, dtype=dtype, mean=1.0, std=0.3) for _ in range(2)]
    rotary = rotary_tables(kind, 6, head_dim)
    poison(query)
    got = qk_norm_rope(query, key, *weights, rotary, head_dim=head_dim, norm=norm, eps=EPS, rounding="eager")
    for result, x, weight in zip(got, (query, key), weights, strict=True):
        same_bits(result, as_upstream(x, weight, kind, rotary, head_dim, norm))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head_dim", [128, 96])
def test_eager_without_a_weight(head_dim: int, norm: str, dtype: torch.dtype) -> None:
    query, key = (stream(1, 5, 4, head_dim, dtype) for _ in range(2))
    got = qk_norm_rope(query, key, head_dim=head_dim, norm=norm, eps=EPS, rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, None, None, None, head_dim, norm))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [128, 64, 256, 40])
def test_torchs_norm_per_head_keeps_every_bit_of_rows_with_large_elements(head_dim: int, dtype: torch.dtype) -> None:
    # In float32, squares that are rounded before they are added change about one row in ten.
    torch.manual_seed(4)
    query, key = (stream(2, 64, 3, head_dim, dtype) * normal(2, 64, 3 * head_dim).exp().to(dtype) for _ in range(2))
    weight = normal(head_dim, dtype=dtype, mean=1.0, std=0.3)
    got = qk_norm_rope(query, key, weight, weight, head_dim=head_dim, norm="rms", eps=EPS, rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, None, None, head_dim, "rms"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [24, 1, 5, 17])
def test_eager_reads_any_strides(layout: str, heads: int) -> None:
    torch.manual_seed(1)
    query, key = (stream(2, 3, heads, 128, torch.bfloat16, layout) for _ in range(2))
    weight = normal(128, dtype=torch.bfloat16)
    rotary = rotary_tables("complex", 3, 128)
    got = qk_norm_rope(query, key, weight, weight, rotary, head_dim=128, norm="diffusers_rms", eps=EPS, rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x.contiguous(), weight, "complex", rotary, 128, "diffusers_rms"))


@pytest.mark.parametrize("kind", ["complex", "per_element"])
@pytest.mark.parametrize("head_dim", [128, 96])
def test_only_the_leading_tokens_are_rotated(kind: str, head_dim: int) -> None:
    query, key = (stream(2, 7, 4, head_dim, torch.bfloat16) for _ in range(2))
    weight = normal(head_dim, dtype=torch.bfloat16)
    rotary = rotary_tables(kind, 4, head_dim)
    got = qk_norm_rope(query, key, weight, weight, rotary, head_dim=head_dim, norm="diffusers_rms", eps=EPS, rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, kind, rotary, head_dim, "diffusers_rms"))


@pytest.mark.parametrize("tokens", [(5, 9), (9, 5), (5, 0), (0, 5)])
def test_query_and_key_of_several_lengths(tokens: tuple[int, int]) -> None:
    query, key = (stream(2, s, 2, 128, torch.bfloat16) for s in tokens)
    weight = normal(256, dtype=torch.bfloat16)
    got = qk_norm_rope(query, key, weight, weight, head_dim=128, norm="rms", eps=EPS, rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, None, None, 128, "rms"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("encoder_first", [True, False])
@pytest.mark.parametrize("encoder_tokens", [3, 0])
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("norm", NORMS)
def test_joint_streams_stand_one_after_the_other(
    norm: str, dtype: torch.dtype, encoder_first: bool, encoder_tokens: int, head_dim: int
) -> None:
    torch.manual_seed(2)
    own, encoder = ([stream(2, s, 3, head_dim, dtype, layout) for layout in ("contiguous", "chunk", "chunk")] for s in (8, encoder_tokens))
    weights = [normal(head_dim, dtype=dtype, mean=1.0, std=0.3) for _ in range(4)]
    rotary, encoder_rotary = rotary_tables("complex", 8, head_dim), rotary_tables("complex", encoder_tokens, head_dim)
    options: dict[str, Any] = {
        "head_dim": head_dim,
        "norm": norm,
        "eps": EPS,
        "encoder_first": encoder_first,
        "rounding": "eager",
    }
    got = joint_qk_norm_rope(*own, *weights[:2], rotary, *encoder, *weights[2:], encoder_rotary, **options)
    expected = []
    for x, weight, e, encoder_weight in zip(own, (*weights[:2], None), encoder, (*weights[2:], None), strict=True):
        if weight is None:
            pair = [t.unflatten(2, (-1, head_dim)) for t in (x, e)]
        else:
            pair = [
                as_upstream(x, weight, "complex", rotary, head_dim, norm),
                as_upstream(e, encoder_weight, "complex", encoder_rotary, head_dim, norm),
            ]
        expected.append(torch.cat(pair[::-1] if encoder_first else pair, dim=1))
    for result, wanted in zip(got, expected, strict=True):
        same_bits(result, wanted)


def exact(x: Tensor, weight: Tensor | None, kind: str | None, rotary: Any, head_dim: int) -> tuple[Tensor, Tensor]:
    """The result in float64 with a bound on the error of float32 arithmetic, u = 2^-24.

    A sum of n squares errs by at most n / 32 + 16 roundings (one warp a row, then its tree), of
    which rstd takes half, and 3 operations; the norm 2 more. Rotation: 2 operations on terms of the
    size |a cos| + |b sin|.
    """
    across = weight is not None and weight.numel() != head_dim
    v = x.double()
    v = v if across else v.unflatten(2, (-1, head_dim))
    n = v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = n if weight is None else n * weight.double()
    slack = n.abs() * UNIT * ((v.shape[-1] / 32 + 16) / 2 + 5)
    if across:
        n, slack = (t.unflatten(2, (-1, head_dim)) for t in (n, slack))
    if kind is None:
        return n, slack
    cos, sin = (rotary.real, rotary.imag) if kind == "complex" else rotary
    cos, sin = (t.double() if t.dim() == 4 else t.double().unsqueeze(-2) for t in (cos, sin))
    if kind != "per_element":
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
    tokens = cos.shape[-3]

    def turned(t: Tensor, sign: int) -> Tensor:
        a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([sign * b, a], dim=-1).flatten(-2)

    head, head_slack = n[:, :tokens], slack[:, :tokens]
    size = head.abs() * cos.abs() + turned(head.abs(), 1) * sin.abs()
    rotated_slack = head_slack * cos.abs() + turned(head_slack, 1) * sin.abs() + 2 * UNIT * size
    rotated = head * cos + turned(head, -1) * sin
    return torch.cat([rotated, n[:, tokens:]], dim=1), torch.cat([rotated_slack, slack[:, tokens:]], dim=1)


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(60))
def test_single_is_the_exact_result_rounded_once(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, heads, batch = rng.choice((*HEAD_DIMS, 128, 128, 34, 2)), rng.choice((1, 2, 3, 5, 24)), rng.choice((1, 2, 3))
    dtype, kind = rng.choice(FLOATS), rng.choice(ROTARY)
    tokens, rotated = rng.choice((1, 5)), rng.choice((1, 5))
    query, key = (
        stream(batch, tokens, heads, head_dim, dtype, rng.choice(("contiguous", "chunk", "unaligned", "channel_strided"))) for _ in "qk"
    )
    across, weighted = rng.random() < 0.4, rng.random() < 0.8
    width = heads * head_dim if across else head_dim
    weights = [normal(width, dtype=rng.choice((dtype, torch.float32)), mean=1.0, std=0.3) if weighted or across else None for _ in "qk"]
    rotary = rotary_tables(kind, min(tokens, rotated), head_dim, rng.choice((0, 0, 1, batch)))
    norm = rng.choice(NORMS)
    poison(query)
    got = qk_norm_rope(query, key, *weights, rotary, head_dim=head_dim, norm=norm, eps=EPS)
    for result, x, weight in zip(got, (query, key), weights, strict=True):
        assert result.is_contiguous()
        value, slack = exact(x, weight, kind, rotary, head_dim)
        error, bound = (result.double() - value).abs(), half_ulp(value.abs() + slack, dtype) + slack
        assert bool((error <= bound).all()), f"{int((error > bound).sum())} of {error.numel()} elements are off"


@pytest.mark.parametrize("dtype", HALVES)
def test_single_is_as_accurate_as_one_rounding(dtype: torch.dtype) -> None:
    query, key = (stream(1, 64, 8, 128, dtype) for _ in range(2))
    weight = normal(128, dtype=dtype, mean=1.0, std=0.3)
    rotary = rotary_tables("per_element", 64, 128)
    for result, x in zip(qk_norm_rope(query, key, weight, weight, rotary, head_dim=128, eps=EPS), (query, key), strict=True):
        value, _ = exact(x, weight, "per_element", rotary, 128)
        assert (result.double() - value).norm() <= 1.02 * (value.to(dtype).double() - value).norm()


@pytest.mark.sanitize
@compiled_only
def test_a_row_doesnt_depend_on_the_others() -> None:
    query, key = (stream(3, 5, 24, 128, torch.bfloat16) for _ in range(2))
    weight, rotary = normal(128, dtype=torch.bfloat16), rotary_tables("complex", 5, 128)
    for rounding in ("single", "eager"):
        options: dict[str, Any] = {"head_dim": 128, "norm": "diffusers_rms", "rounding": rounding}
        whole = qk_norm_rope(query, key, weight, weight, rotary, **options)
        part = qk_norm_rope(query[1:2], key[1:2], weight, weight, rotary, **options)
        for a, b in zip(whole, part, strict=True):
            same_bits(b, a[1:2])


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_compiled_kernels_serve_every_form(head_dim: int, dtype: torch.dtype) -> None:
    before = kernels.counts()
    for kind in ROTARY:
        own, encoder = ([stream(2, s, 3, head_dim, dtype) for _ in range(3)] for s in (4, 2))
        weight, rotary = normal(head_dim, dtype=dtype), rotary_tables(kind, 4, head_dim)
        q, k, v = joint_qk_norm_rope(*own, weight, weight, rotary, *encoder, weight, weight, None, head_dim=head_dim, rounding="single")
        same_bits(v, torch.cat([own[2], encoder[2]], dim=1).unflatten(2, (-1, head_dim)))
        assert q.isfinite().all()
        assert k.isfinite().all()
    after = kernels.counts()
    assert {key: n - before[key] for key, n in after.items() if n != before[key]} == {("joint_qk_norm_rope", kernels.path): 4}


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("kind", ROTARY)
def test_gradients_are_those_of_upstream(rounding: str, kind: str | None) -> None:
    torch.manual_seed(3)
    inputs = [stream(2, 5, 2, 16, torch.float32).requires_grad_() for _ in "qk"]
    weights = [normal(16, mean=1.0).requires_grad_() for _ in "qk"]
    rotary = rotary_tables(kind, 4, 16)
    results = qk_norm_rope(*inputs, *weights, rotary, head_dim=16, norm="diffusers_rms", eps=EPS, rounding=rounding)
    upstream = [as_upstream_in_pytorch(x, w, kind, rotary) for x, w in zip(inputs, weights, strict=True)]
    cotangents = [torch.randn_like(r) for r in upstream]
    got = torch.autograd.grad(results, [*inputs, *weights], cotangents)
    wanted = torch.autograd.grad(upstream, [*inputs, *weights], cotangents)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def as_upstream_in_pytorch(x: Tensor, weight: Tensor, kind: str | None, rotary: Any) -> Tensor:
    norm = RMSNorm(weight.numel(), eps=EPS, elementwise_affine=False)
    n = norm(x.unflatten(2, (-1, weight.numel()))) * weight
    if kind == "complex":
        return torch.cat([apply_rotary_emb_qwen(n[:, : len(rotary)], rotary, use_real=False), n[:, len(rotary) :]], dim=1)
    return rotate_as_upstream(n, kind, rotary)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("of_key", "tables"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_single_rounding_of_mixed_dtypes_rounds_once(of_key: torch.dtype, tables: torch.dtype, grad: bool) -> None:
    # A model cast as a whole has tables of half precision; upstream's expression takes them.
    query, key = stream(1, 3, 2, 16, torch.bfloat16).requires_grad_(grad), stream(1, 3, 2, 16, of_key)
    cos, sin = normal(3, 8).to(tables), normal(3, 8).to(tables)
    before = kernels.counts()
    q, k = qk_norm_rope(query, key, None, None, (cos, sin), head_dim=16)
    assert (q.dtype, k.dtype) == (query.dtype, key.dtype)
    for x, y in ((query, q), (key, k)):
        exact = norm_rope(x.float(), None, cos.float(), sin.float(), 16, "rms", 1e-6, "eager")
        assert torch.equal(y, exact.to(x.dtype))
    assert kernels.counts()["qk_norm_rope", "reference"] == before["qk_norm_rope", "reference"] + 1


def test_mixed_dtypes_run_the_unfused_expression() -> None:
    query, key = (stream(1, 3, 2, 16, torch.bfloat16) for _ in range(2))
    weight = normal(16)  # float32 under a half-precision model: upstream promotes
    before = kernels.counts()
    q, _ = qk_norm_rope(query, key, weight, weight, head_dim=16, norm="diffusers_rms", rounding="eager")
    assert q.dtype is torch.float32
    assert kernels.counts()["qk_norm_rope", "reference"] == before["qk_norm_rope", "reference"] + 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": 3}, TypeError, "query: expected a Tensor"),
        ({"query": torch.zeros(2, 3)}, ValueError, r"query: expected shape \[B, S, H \* 16\]"),
        ({"key": torch.zeros(3, 4, 32)}, ValueError, "key: expected the batch of query, 2"),
        ({"key": torch.zeros(2, 4, 33)}, ValueError, "key: expected shape"),
        ({"query_weight": torch.zeros(8)}, ValueError, r"query_weight: expected shape \[16\] \(per head\) or \[32\]"),
        ({"rotary": torch.zeros(4, 8)}, TypeError, "rotary: expected a complex Tensor"),
        ({"rotary": (torch.zeros(4, 8),)}, TypeError, "rotary: expected None, a complex Tensor or a pair"),
        ({"rotary": (torch.zeros(5, 8), torch.zeros(5, 8))}, ValueError, "rotary: got .* S at most 4"),
        ({"rotary": (torch.zeros(4, 8), torch.zeros(4, 16))}, ValueError, "rotary: expected cos and sin alike"),
        ({"rotary": (torch.zeros(3, 4, 8), torch.zeros(3, 4, 8))}, ValueError, "rotary: got"),
        ({"norm": "layer"}, ValueError, "norm: expected one of 'rms', 'diffusers_rms'"),
        ({"rounding": "twice"}, ValueError, "rounding: expected one of"),
        ({"head_dim": 0}, ValueError, "head_dim: expected at least 1"),
        ({"head_dim": 2.0}, TypeError, "head_dim: expected an int"),
        ({"key": torch.zeros(2, 4, 32, device="meta")}, ValueError, "key: expected the device of query"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"query": torch.zeros(2, 4, 32), "key": torch.zeros(2, 4, 32), "query_weight": torch.ones(16)}
    call |= {"key_weight": torch.ones(16), "head_dim": 16}

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(moved(v) for v in value)
        return value.to(DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value

    with pytest.raises(error, match=message):
        qk_norm_rope(**{name: moved(value) for name, value in (call | changes).items()})


def test_what_says_which_stream_comes_first_is_named() -> None:
    own, encoder = torch.randn(3, 1, 4, 16).unbind(), torch.randn(3, 1, 2, 16).unbind()
    for given in ("yes", [True]):
        with pytest.raises(TypeError, match=f"encoder_first: expected a bool, got {type(given).__name__}"):
            joint_qk_norm_rope(*own, None, None, None, *encoder, None, None, None, head_dim=16, encoder_first=given)  # type: ignore[arg-type]


def test_tables_without_the_sines_are_named() -> None:
    query, key = torch.randn(2, 1, 4, 16).unbind()
    for rotary in (torch.randn(4, 16), (torch.randn(4, 16), None)):
        with pytest.raises(TypeError, match=r"rotary: expected a complex Tensor or a pair \(cos, sin\), got one Tensor of torch.float32"):
            qk_norm_rope(query, key, None, None, rotary, head_dim=16)  # type: ignore[arg-type]


def test_joint_streams_of_several_widths_are_named() -> None:
    own, encoder = ([torch.zeros(1, 4, width, device=DEVICE)] * 3 for width in (32, 16))
    with pytest.raises(ValueError, match="encoder_query: expected the tokens"):
        joint_qk_norm_rope(*own, None, None, None, *encoder, None, None, None, head_dim=16)


@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_compiles_without_a_graph_break(rounding: str) -> None:
    query, key = (stream(1, 6, 2, 16, torch.float32) for _ in range(2))
    weight, rotary = normal(16), rotary_tables("complex", 6, 16)

    def function(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(q * 2, k, weight, weight, rotary, head_dim=16, norm="diffusers_rms", rounding=rounding)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(query, key), function(query, key), strict=True):
        same_bits(a, b)


def test_opcheck() -> None:
    weight, rotary = normal(16), rotary_tables("complex", 4, 16)
    own, encoder = ([stream(2, s, 2, 16, torch.float32) for _ in range(3)] for s in (4, 3))
    torch.library.opcheck(kernels.ops.qk_norm_rope.default, (*own[:2], weight, weight, rotary, None, None, None, 16, 1, EPS, 0, 1))
    arguments = (*own, weight, weight, rotary, None, *encoder, weight, weight, None, None, 16, 1, EPS, True, 1)
    torch.library.opcheck(kernels.ops.joint_qk_norm_rope.default, arguments)


@reference_only
def test_calls_on_the_cpu_are_counted_as_the_references() -> None:
    before = kernels.counts()["qk_norm_rope", "reference"]
    qk_norm_rope(*(stream(1, 2, 1, 8, torch.float32) for _ in "qk"), head_dim=8)
    assert kernels.counts()["qk_norm_rope", "reference"] == before + 1


@pytest.mark.skipif(MODE != "cuda", reason="ATen's order on CUDA")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", NORMS)
def test_many_random_rows_keep_every_bit(norm: str, head_dim: int, dtype: torch.dtype) -> None:
    # A wrong order of reduction changes about one row in a hundred.
    query, key = (stream(2, 2048, 8, head_dim, dtype) for _ in range(2))
    weight, rotary = normal(head_dim, dtype=dtype, mean=1.0, std=0.3), rotary_tables("complex", 2048, head_dim)
    got = qk_norm_rope(query, key, weight, weight, rotary, head_dim=head_dim, norm=norm, eps=EPS, rounding="eager")
    for result, x in zip(got, (query, key), strict=True):
        same_bits(result, as_upstream(x, weight, "complex", rotary, head_dim, norm))


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_leaves_diffusers_norm_and_the_rotation_alone(dtype: torch.dtype) -> None:
    query, key = (stream(2, 6, 3, 64, dtype) for _ in range(2))
    weight, rotary = normal(64, dtype=dtype, mean=1.0), rotary_tables("complex", 6, 64)
    with torch.autocast(DEVICE, dtype), torch.no_grad():
        before = kernels.counts()
        got = qk_norm_rope(query, key, weight, weight, rotary, head_dim=64, norm="diffusers_rms", eps=EPS, rounding="eager")
        path = "reference" if MODE == "reference" else kernels.path
        assert {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]} == {("qk_norm_rope", path): 1}
        for result, x in zip(got, (query, key), strict=True):
            same_bits(result, as_upstream(x, weight, "complex", rotary, 64, "diffusers_rms"))
