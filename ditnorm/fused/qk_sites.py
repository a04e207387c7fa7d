"""The fused call of an attention module: what its bits depend on, and its comparison with the
unfused expression.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..ops.bits import same_bits
from ..ops.table import OPS
from .sites import random_numbers

Tables = tuple[Tensor | None, Tensor | None]

_TOKENS, _ENCODER_TOKENS = 512, 24  # times a model's heads: rows enough to show a wrong order of reduction, which changes about 1 %


@dataclass(frozen=True)
class QKSite:
    """The norm of query and key with its rotary embedding. ``weight``: a dtype, None where there is
    none.
    """

    joint: bool
    heads: int
    head_dim: int
    across: bool
    dtype: torch.dtype
    norm: str
    eps: float
    weight: torch.dtype | None
    rotary: str | None
    quantised: None = None

    @property
    def op(self) -> str:
        return "joint_qk_norm_rope" if self.joint else "qk_norm_rope"

    @property
    def fused(self) -> bool:
        return self.weight in (None, self.dtype)

    def __str__(self) -> str:
        return f"{self.op} ({self.dtype}, {self.heads} heads of {self.head_dim})".replace("torch.", "")

    def same_bits(self, device: torch.device) -> bool:
        """Each row has its own mean and scale; there are rotary tables for all tokens and for the
        leading ones.
        """
        random, width = random_numbers(device), self.heads * self.head_dim

        def streams(tokens: int, count: int) -> list[Tensor]:
            return [(random(1, tokens, width) * random(1, tokens, 1).exp() + random(1, tokens, 1)).to(self.dtype) for _ in range(count)]

        def weights() -> list[Tensor | None]:
            if self.weight is None:
                return [torch.ones(width, device=device, dtype=self.dtype) if self.across else None] * 2
            return [(1 + random(width if self.across else self.head_dim)).to(self.weight) for _ in range(2)]

        fused: Any = getattr(functional, self.op)
        unfused: Any = OPS[self.op].expression
        options: dict[str, Any] = {"head_dim": self.head_dim, "norm": self.norm, "eps": self.eps, "rounding": "eager"}
        if self.joint:
            own, encoder = streams(_TOKENS, 3), streams(_ENCODER_TOKENS, 3)
            encoder_tables = self._tables(random, _ENCODER_TOKENS) if self.rotary == "complex" else (None, None)
            tensors: tuple[Any, ...] = (*own, *weights(), *self._tables(random, _TOKENS), *encoder, *weights(), *encoder_tables)
            expected: Any = unfused(*tensors, **options, encoder_first=False)
            with_pairs: tuple[Any, ...] = (*tensors[:5], _rotary(*tensors[5:7]), *tensors[7:12], _rotary(*tensors[12:]))
            return same_bits(fused(*with_pairs, **options), expected)
        rows: tuple[Any, ...] = (*streams(_TOKENS, 2), *weights())
        options["pairs"] = "halves" if self.rotary == "halves" else "neighbours"
        for tables, of_key in self._tables_of_calls(random):
            expected = unfused(*rows, *tables, *of_key, **options)
            if not same_bits(fused(*rows, _rotary(*tables), key_rotary=_rotary(*of_key), **options), expected):
                return False
        return True

    def _tables_of_calls(self, random: Callable[..., Tensor]) -> Iterator[tuple[Tables, Tables]]:
        """The query's and the key's own: in all ways in which a module of this kind is called."""
        if self.rotary in ("halves", "per_element_of_head"):
            yield (None, None), (None, None)
            yield self._tables(random, _TOKENS), (None, None)
            yield self._tables(random, _TOKENS), self._tables(random, _TOKENS)
        else:
            for tokens in (_TOKENS, _TOKENS - _ENCODER_TOKENS):
                yield self._tables(random, tokens), (None, None)

    def _tables(self, random: Callable[..., Tensor], tokens: int) -> Tables:
        if self.rotary is None:
            return None, None
        if self.rotary == "halves":
            angles = random(1, tokens, self.heads, self.head_dim // 2)
            return angles.cos(), angles.sin()
        if self.rotary == "per_element_of_head":
            angles = random(1, tokens, self.heads, self.head_dim // 2).repeat_interleave(2, dim=-1)
            return angles.cos(), angles.sin()
        angles = random(tokens, self.head_dim // 2)
        if self.rotary == "complex":
            return torch.polar(torch.ones_like(angles), angles), None
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (angles.cos(), angles.sin()))
        return (cos, sin) if self.rotary == "per_element" else (cos[None, :, None, 0::2], sin[None, :, None, 1::2])


def _rotary(cos: Tensor | None, sin: Tensor | None) -> Any:
    return cos if sin is None else (cos, sin)
