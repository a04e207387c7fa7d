"""Random streams and rotary tables for query and key, and what diffusers' processors make of
them.
"""

from typing import Any

import torch
from torch import Tensor

from .cases import DEVICE
from .qk_expressions import diffusers_rms_norm, hunyuan_rotary, qwen_rotary, torch_rms_norm, wan_rotary

HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (128, 64, 96, 256, 40, 8)
NORMS = ("rms", "diffusers_rms")
ROTARY = (None, "complex", "per_pair", "per_element")
LAYOUTS = ("contiguous", "chunk", "unaligned", "channel_strided")
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return (torch.randn(shape) * std + mean).to(dtype).to(DEVICE)


def stream(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Query, key or value [B, S, H * d], as the projections leave it."""
    width = heads * head_dim
    if layout == "chunk":
        return normal(batch, tokens, 3 * width, dtype=dtype, mean=0.3, std=2.0).chunk(3, dim=-1)[1]
    if layout == "unaligned":
        return normal(batch * tokens * width + 1, dtype=dtype)[1:].view(batch, tokens, width)
    if layout == "channel_strided":
        return normal(batch, width, tokens, dtype=dtype).transpose(1, 2)
    return normal(batch, tokens, width, dtype=dtype, mean=0.3, std=2.0)


def rotary_tables(kind: str | None, tokens: int, head_dim: int, batch: int = 0) -> Any:
    """What the families' models pass: shared by the batch, or for each sample where ``batch`` is
    given.
    """
    size = (batch, tokens) if batch else (tokens,)
    if kind is None:
        return None
    if kind == "complex":
        return torch.polar(torch.ones(*size, head_dim // 2), torch.randn(*size, head_dim // 2) * 3).to(DEVICE)
    angles = torch.randn(2, *size, head_dim) * 3
    cos, sin = angles[0].cos().to(DEVICE), angles[1].sin().to(DEVICE)
    if kind == "per_pair":
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return (cos[..., 0::2], sin[..., 1::2]) if batch else (cos[None][..., 0::2], sin[None][..., 1::2])
    return cos, sin


def rotate_as_upstream(x: Tensor, kind: str | None, rotary: Any) -> Tensor:
    if kind is None or x.numel() == 0:
        return x
    tokens = rotary.shape[0] if kind == "complex" else rotary[0].shape[1 if kind == "per_pair" else 0]
    function = {"complex": qwen_rotary, "per_pair": wan_rotary, "per_element": hunyuan_rotary}[kind]
    return torch.cat([function(x[:, :tokens], rotary), x[:, tokens:]], dim=1)


def as_upstream(x: Tensor, weight: Tensor | None, kind: str | None, rotary: Any, head_dim: int, norm: str) -> Tensor:
    """A projection as diffusers' processors norm and rotate it, module for module."""
    across = weight is not None and weight.numel() != head_dim
    normed = torch_rms_norm if norm == "rms" else diffusers_rms_norm
    if across:
        return rotate_as_upstream(normed(x, weight, EPS).unflatten(2, (-1, head_dim)), kind, rotary)
    return rotate_as_upstream(normed(x.unflatten(2, (-1, head_dim)), weight, EPS), kind, rotary)
