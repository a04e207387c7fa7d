"""Compares the fused call of an attention module with the unfused expression: for :mod:`ditnorm.patching.verification`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..fused.attention import FusedAttention
from ..layers import _DEFAULT_EPS
from ..ops import checks, reference_qk

_TOKENS, _ENCODER_TOKENS = 512, 24  # times a model's heads: rows enough to show a wrong order of reduction, which changes about 1 %


@dataclass(frozen=True)
class HeadSite:
    """What the bits of an attention module's fused call depend on. ``weight``: a dtype, None where there is none."""

    joint: bool
    heads: int
    head_dim: int
    across: bool
    dtype: torch.dtype
    norm: str
    eps: float
    weight: torch.dtype | None
    rotary: str

    @property
    def op(self) -> str:
        return "joint_qk_norm_rope" if self.joint else "qk_norm_rope"

    def __str__(self) -> str:
        return f"{self.op} ({self.dtype}, {self.heads} heads of {self.head_dim})".replace("torch.", "")


def sites(attention: nn.Module, body: type[FusedAttention], dtype: torch.dtype) -> Iterator[HeadSite]:
    """The fused calls of an attention module; none where its weights are not in the model's dtype, since those run unfused."""
    norm: Any = attention.norm_q
    weight: Tensor | None = norm.weight
    width: int = attention.inner_dim  # type: ignore[assignment]
    heads: int = attention.heads  # type: ignore[assignment]
    across = body.norm == "rms"
    eps = _DEFAULT_EPS if norm.eps is None else norm.eps
    joint = "norm_added_q" in body.norms(attention)
    if weight is None or weight.dtype is dtype:
        yield HeadSite(joint, heads, width // heads, across, dtype, body.norm, eps, None if weight is None else dtype, body.rotary)


def compare(site: HeadSite, device: torch.device) -> bool:
    """Random rows, each with its own mean and scale, with rotary tables for all tokens and for the leading ones."""
    generator = torch.Generator(device).manual_seed(0)
    width = site.heads * site.head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def streams(tokens: int, count: int) -> list[Tensor]:
        return [(random(1, tokens, width) * random(1, tokens, 1).exp() + random(1, tokens, 1)).to(site.dtype) for _ in range(count)]

    def weights() -> list[Tensor | None]:
        return [None if site.weight is None else (1 + random(width if site.across else site.head_dim)).to(site.weight) for _ in range(2)]

    fused: Any = functional.joint_qk_norm_rope if site.joint else functional.qk_norm_rope
    unfused: Any = reference_qk.joint_qk_norm_rope if site.joint else reference_qk.qk_norm_rope
    options: dict[str, Any] = {"head_dim": site.head_dim, "norm": site.norm, "eps": site.eps, "rounding": "eager"}
    if site.joint:
        own, encoder = streams(_TOKENS, 3), streams(_ENCODER_TOKENS, 3)
        encoder_tables = _tables(site, random, _ENCODER_TOKENS) if site.rotary == "complex" else (None, None)
        tensors: tuple[Any, ...] = (*own, *weights(), *_tables(site, random, _TOKENS), *encoder, *weights(), *encoder_tables)
        expected: Any = unfused(*tensors, **options, encoder_first=False)
        with_pairs: tuple[Any, ...] = (*tensors[:5], _rotary(*tensors[5:7]), *tensors[7:12], _rotary(*tensors[12:]))
        return checks.same_bits(fused(*with_pairs, **options), expected)
    rows: tuple[Any, ...] = (*streams(_TOKENS, 2), *weights())
    for tokens in (_TOKENS, _TOKENS - _ENCODER_TOKENS):
        cos, sin = _tables(site, random, tokens)
        expected = unfused(*rows, cos, sin, **options)
        if not checks.same_bits(fused(*rows, _rotary(cos, sin), **options), expected):
            return False
    return True


def _tables(site: HeadSite, random: Any, tokens: int) -> tuple[Tensor, Tensor | None]:
    angles = random(tokens, site.head_dim // 2)
    if site.rotary == "complex":
        return torch.polar(torch.ones_like(angles), angles), None
    cos, sin = (t.repeat_interleave(2, dim=-1) for t in (angles.cos(), angles.sin()))
    return (cos, sin) if site.rotary == "per_element" else (cos[None, :, None, 0::2], sin[None, :, None, 1::2])


def _rotary(cos: Tensor | None, sin: Tensor | None) -> Any:
    return cos if sin is None else (cos, sin)
