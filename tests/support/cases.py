"""Random arguments for the ops, the exact result in float64, and the bounds on the error of
``rounding="single"``.

The exact result lays modulations out by itself (``dense``), so it shares no code with
``ditnorm.ops.reference``.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ditnorm import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODE = "cuda" if DEVICE == "cuda" else "cpu_sim" if "DITNORM_LIBRARY" in os.environ else "reference"
compiled_only = pytest.mark.skipif(MODE == "reference", reason="needs the compiled kernels: a GPU, or DITNORM_LIBRARY with a host build")
torch_norms = pytest.mark.skipif(
    MODE == "cpu_sim", reason="torch's norms on the CPU have other bits than the host build of the CUDA kernels"
)
reference_only = pytest.mark.skipif(MODE != "reference", reason="a property of the PyTorch path, which the compiled kernels replace here")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
OPS: dict[str, Callable[..., Any]] = {
    "norm_scale_shift": functional.norm_scale_shift,
    "scale_residual_norm_scale_shift": functional.scale_residual_norm_scale_shift,
    "scale_residual": functional.scale_residual,
}
MODULATIONS = {
    "norm_scale_shift": ("scale", "shift"),
    "scale_residual_norm_scale_shift": ("gate", "scale", "shift"),
    "scale_residual": ("gate",),
}

X_LAYOUTS = ("contiguous", "row_stride", "batch_stride", "channel_strided", "expanded", "unaligned")
LAYOUTS = ("vector", "sample", "sample_of_one", "sample_3d", "sample_3d_of_one", "token", "token_of_one", "frame", "frame_of_one")
VIEWS = ("chunk", "chunk_3d", "token_chunk", "unaligned")
ROWS = ("rows", "rows_batch", "rows_of_one", "rows_transposed", "rows_chunk")

EPS = 1e-6
UNIT = 2.0**-24  # unit roundoff of float32

# With the eps of diffusers' blocks, which the expressions that they are compared with have too.
norm_scale_shift = partial(functional.norm_scale_shift, eps=EPS)
scale_residual_norm_scale_shift = partial(functional.scale_residual_norm_scale_shift, eps=EPS)


@dataclass
class Shape:
    batch: int
    tokens: int
    width: int
    frames: int = 1
    rows: int = 2  # M, with index


def activation(layout: str, shape: Shape, dtype: torch.dtype, *, mean: float = 0.5, std: float = 1.5) -> Tensor:
    """``x`` or ``residual`` [B, S, D] in one of ``X_LAYOUTS``."""
    b, s, d = shape.batch, shape.tokens, shape.width

    def normal(*size: int) -> Tensor:
        return (torch.randn(size) * std + mean).to(dtype).to(DEVICE)

    match layout:
        case "row_stride":
            return normal(b, s, 2 * d + 8)[..., d : 2 * d]
        case "batch_stride":
            return normal(b, s + 3, d)[:, 2 : s + 2]
        case "channel_strided":
            return normal(b, d, s).transpose(1, 2)
        case "expanded":
            return normal(1, s, d).expand(b, s, d)
        case "unaligned":
            return normal(b * s * d + 1)[1:].view(b, s, d)
        case _:
            return normal(b, s, d)


def modulation(layout: str, shape: Shape, dtype: torch.dtype, std: float = 0.7) -> Tensor:
    """``gate``, ``scale`` or ``shift`` in one of ``LAYOUTS``, ``VIEWS`` or, for use with an index,
    ``ROWS``.
    """
    b, s, d, f, m = shape.batch, shape.tokens, shape.width, shape.frames, shape.rows

    def normal(*size: int) -> Tensor:
        return (torch.randn(size) * std).to(dtype).to(DEVICE)

    makers: dict[str, Callable[[], Tensor]] = {
        "vector": lambda: normal(d),
        "sample": lambda: normal(b, d),
        "sample_of_one": lambda: normal(1, d),
        "sample_3d": lambda: normal(b, 1, d),
        "sample_3d_of_one": lambda: normal(1, 1, d),
        "token": lambda: normal(b, s, d),
        "token_of_one": lambda: normal(1, s, d),
        "frame": lambda: normal(b, f, 1, d),
        "frame_of_one": lambda: normal(1, f, 1, d),
        "chunk": lambda: normal(b, 6 * d).chunk(6, dim=-1)[2],
        "chunk_3d": lambda: normal(b, 6, d).chunk(6, dim=1)[3],
        "token_chunk": lambda: normal(b, s, 6, d).chunk(6, dim=2)[4].squeeze(2),
        "unaligned": lambda: normal(b * d + 1)[1:].view(b, d),
        "rows": lambda: normal(m, d),
        "rows_batch": lambda: normal(b, m, d),
        "rows_of_one": lambda: normal(1, m, d),
        "rows_transposed": lambda: normal(m, b, d).transpose(0, 1),
        "rows_chunk": lambda: normal(b, m, 3 * d).chunk(3, dim=-1)[1],
    }
    return makers[layout]()


def selection(kind: str, shape: Shape) -> Tensor:
    """``index``: bool or integer, [S] or [B, S]."""
    size = (shape.tokens,) if kind.endswith("_1d") else (shape.batch, shape.tokens)
    dtype = getattr(torch, kind.removesuffix("_1d"))
    return torch.randint(2 if dtype is torch.bool else shape.rows, size).to(dtype).to(DEVICE)


def random_call(op: str, width: int, seed: int, rounding: str) -> dict[str, Any]:
    """Arguments of one random call: every layout, stride and option drawn on its own; dtypes too
    for ``"single"``.
    """
    rng = random.Random(f"{op} {width} {seed} {rounding}")
    torch.manual_seed(seed)
    frames = rng.choice((1, 2, 3))
    tokens = frames * rng.choice((1, 2, 5) if width < 2048 else (1, 2))
    shape = Shape(rng.choice((1, 2, 3)), tokens, width, frames, rng.choice((1, 2, 4)))
    two_dims = rng.random() < 0.15
    if two_dims:
        shape.batch = 1
    dtype = rng.choice(FLOATS)
    other = (lambda: rng.choice(FLOATS)) if rounding == "single" else (lambda: dtype)
    call: dict[str, Any] = {"x": activation(rng.choice(X_LAYOUTS), shape, dtype), "rounding": rounding}
    if op != "norm_scale_shift":
        call["residual"] = activation(rng.choice(X_LAYOUTS), shape, other())
    if two_dims:
        call |= {name: call[name][0] for name in ("x", "residual") if name in call}
    wide = rounding == "eager" and rng.random() < 0.5
    indexed = rng.random() < 0.25
    given = [name for name in MODULATIONS[op] if rng.random() < 0.8]
    for name in given:
        m_dtype = torch.float32 if wide else other()
        call[name] = modulation(rng.choice(ROWS if indexed else LAYOUTS + VIEWS), shape, m_dtype)
        if rng.random() < 0.3:
            call[f"{name}_table"] = modulation("vector", shape, rng.choice((torch.float32, dtype)))
    if indexed and given:
        call["index"] = selection(rng.choice(("bool", "uint8", "int32", "int64_1d")) if shape.rows == 2 else "int64", shape)
    if op != "scale_residual":
        call |= {"norm": rng.choice(("layer", "rms", "fp32_layer")), "eps": rng.choice((EPS, 1e-5, 1e-3))}
        for name in ("weight", "bias"):
            if rng.random() < 0.4:
                call[name] = modulation("vector", shape, other())
    return call


def run(op: str, call: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """``(y, r)`` of the op (None for what it doesn't return), on memory that held NaN."""
    poison(call["x"])
    result = OPS[op](**call)
    if op == "norm_scale_shift":
        return result, None
    return (None, result) if op == "scale_residual" else result


def poison(like: Tensor) -> None:
    """Frees blocks of NaN of the size that the outputs will ask for, so that an element that is
    never written shows.
    """
    blocks = [torch.full(like.shape, float("nan"), dtype=like.dtype, device=like.device) for _ in range(3)]
    del blocks


def dense(m: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """A modulation laid out for every element of ``x`` [B, S, D], in float64."""
    b, s, d = x.shape
    m = m.double()
    if index is not None:
        rows = m.expand(b, *m.shape[-2:])
        return rows.gather(1, index.long().expand(b, s)[..., None].expand(b, s, d))
    if m.dim() == 2:
        m = m.unsqueeze(1)
    if m.dim() == 4:
        f = m.shape[1]
        return m.expand(b, f, s // f if f else 0, d).reshape(b, s, d)
    return m.expand(b, s, d)


@dataclass
class Bounded:
    """An exact value and how far fp32 arithmetic may be from it before the one rounding of the
    result.
    """

    value: Tensor
    slack: Tensor


def exact(call: dict[str, Any], r: Tensor | None) -> tuple[Bounded | None, Bounded | None]:
    """``(y, r)`` in float64 with the bounds on fp32 arithmetic; ``y`` given the ``r`` that the op
    has stored.

    Derivation, u = 2^-24. Each fp32 operation errs by u of its result. ``residual + (gate + table)
    * x``: 3 operations on terms of size |residual|, (|gate| + |table|) |x|. Norm: with chains of K
    roundings (K = D / 32 + 16: one warp a row, then its tree) mean errs by K u max|v|, the variance
    by a relative K u sqrt(1 + mean^2 / var), rstd by half of that and 4 operations. Modulation: 6
    more.
    """
    x = call["x"]
    shape = x.shape
    if x.dim() == 2:
        x = x[None]

    def parts(name: str) -> tuple[Tensor, Tensor]:
        """Value and size of a modulation with its table."""
        m, table = call.get(name), call.get(f"{name}_table")
        if m is None:
            zero = torch.zeros((), dtype=torch.float64, device=x.device)
            return zero, zero
        value = dense(m, x, call.get("index"))
        added = torch.zeros_like(value) if table is None else table.double()
        return value + added, value.abs() + added.abs()

    bounded_r = None
    v = x.double()
    if "residual" in call:
        residual = call["residual"].double().view(x.shape) if call["residual"].dim() == 2 else call["residual"].double()
        gate, size = parts("gate") if call.get("gate") is not None else (torch.ones_like(residual), torch.ones_like(residual))
        value = residual + gate * v
        bounded_r = Bounded(value.reshape(shape), (3 * UNIT * (residual.abs() + size * v.abs())).reshape(shape))
        if "norm" not in call:
            return None, bounded_r
        assert r is not None
        v = r.double().reshape(x.shape)
    n, n_slack = _norm(v, call["norm"], call["eps"])
    weight, bias = (
        call[name].double() if name in call else torch.tensor(default, dtype=torch.float64, device=x.device)
        for name, default in (("weight", 1.0), ("bias", 0.0))
    )
    (scale, scale_size), (shift, shift_size) = parts("scale"), parts("shift")
    y = (n * weight + bias) * (1 + scale) + shift
    size = (1 + scale_size) * ((n * weight).abs() + bias.abs()) + shift_size
    slack = (1 + scale_size) * weight.abs() * n_slack + 6 * UNIT * size
    return Bounded(y.reshape(shape), slack.reshape(shape)), bounded_r


def _norm(v: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    chain = v.shape[-1] / 32 + 16
    mean = torch.zeros_like(v[..., :1]) if norm == "rms" else v.mean(-1, keepdim=True)
    centred = v - mean
    variance = centred.square().mean(-1, keepdim=True)
    rstd = (variance + eps).rsqrt()
    largest = v.abs().amax(-1, keepdim=True) if v.numel() else mean
    condition = (1 + mean.square() / (variance + eps)).sqrt()
    mean_error = 0.0 if norm == "rms" else chain * UNIT * largest
    n = centred * rstd
    return n, mean_error * rstd + n.abs() * UNIT * (chain * condition / 2 + 4)


def rounded_once(result: Tensor, expected: Bounded) -> None:
    """Asserts that every element is within half an ulp of its dtype, plus the slack, of the exact
    value.
    """
    error = (result.double() - expected.value).abs()
    bound = half_ulp(expected.value.abs() + expected.slack, result.dtype) + expected.slack
    worst = (error - bound).amax().item() if error.numel() else 0.0
    assert result.isfinite().all()
    assert worst <= 0, f"{int((error > bound).sum())} of {error.numel()} elements are off, by up to {worst:.3g} beyond the bound"


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(value, info.eps / 4), exponent)
