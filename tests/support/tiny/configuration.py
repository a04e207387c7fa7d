"""A tiny model of a family: its configuration and what its inputs are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT, TEXT_DIM = 7, 16
"""Tokens of a text, and their width."""

Inputs = Callable[[torch.Generator, int, torch.dtype], dict[str, Any]]
"""Arguments of a forward, for a batch of so many samples, floating-point ones in the dtype."""


@dataclass(frozen=True)
class Tiny:
    """``cls(**config)`` and ``inputs`` for its forward."""

    cls: str
    """Its name in diffusers. Releases that lack it, or a key of ``config``, have no such model."""
    config: dict[str, Any]
    inputs: Inputs
    calls: tuple[int, ...]
    """Fused calls of one forward, in the order of ``kernels.OPS``; ops left out have none."""
    activations: int = 0
    """Those of ``gelu`` and ``swiglu``, which ``calls`` doesn't count."""

    @property
    def total(self) -> int:
        """All fused calls of one forward."""
        return sum(self.calls) + self.activations


def random_video(g: torch.Generator, b: int, dtype: torch.dtype, channels: int = 4, frames: int = 2) -> Tensor:
    return torch.randn(b, channels, frames, 8, 8, generator=g).to(dtype)


def random_text(g: torch.Generator, b: int, dtype: torch.dtype, tokens: int = TEXT) -> Tensor:
    return torch.randn(b, tokens, TEXT_DIM, generator=g).to(dtype)


def text_mask(b: int, tokens: int = TEXT) -> Tensor:
    mask = torch.ones(b, tokens, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def timesteps(b: int) -> Tensor:
    return torch.tensor([700, 300])[:b]
