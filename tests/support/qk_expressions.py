"""The unfused expressions of diffusers' attention processors, as it writes them: what
``rounding="eager"`` must equal bit for bit.

With the host build of the CUDA kernels the norms have the bits that they have on CUDA
(``aten_replay``), and so has the complex product.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx2 import apply_interleaved_rotary_emb, apply_split_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor

from . import aten_replay
from .cases import MODE


def torch_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``torch.nn.RMSNorm``: norm_q and norm_k of ``WanAttention``."""
    function = aten_replay.rms_norm if MODE == "cpu_sim" else F.rms_norm
    return function(x, x.shape[-1:], weight, eps)


def diffusers_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Diffusers' ``RMSNorm``: norm_q and norm_k of ``Attention``."""
    if MODE == "cpu_sim":
        return aten_replay.diffusers_rms_norm(x, weight, eps)
    norm = RMSNorm(x.shape[-1], eps=eps, elementwise_affine=weight is not None)
    if weight is not None:
        norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


def qwen_rotary(x: Tensor, freqs: Tensor) -> Tensor:
    if MODE == "cpu_sim":
        return aten_replay.complex_rotary(x, freqs)
    return apply_rotary_emb_qwen(x, freqs, use_real=False)


def hunyuan_rotary(x: Tensor, freqs: tuple[Tensor, Tensor]) -> Tensor:
    return apply_rotary_emb(x, freqs, sequence_dim=1)


def wan_rotary(x: Tensor, freqs: tuple[Tensor, Tensor]) -> Tensor:
    """The inner function of ``WanAttnProcessor``, after it has taken every second value of its
    tables.
    """
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def ltx2_rotary(x: Tensor, freqs: tuple[Tensor, Tensor], pairs: str) -> Tensor:
    """``x`` [B, S, H, d] by tables [B, S, H, n], of ``LTX2AudioVideoRotaryPosEmbed`` but for their
    order of dims.
    """
    cos, sin = freqs
    rows, heads = x.flatten(2), x.shape[2]
    if pairs == "neighbours":
        return apply_interleaved_rotary_emb(rows, (cos.flatten(2), sin.flatten(2))).unflatten(2, (heads, -1))
    if MODE == "cpu_sim":
        return aten_replay.split_rotary(x, cos, sin)
    return apply_split_rotary_emb(rows, (cos.transpose(1, 2), sin.transpose(1, 2))).unflatten(2, (heads, -1))
