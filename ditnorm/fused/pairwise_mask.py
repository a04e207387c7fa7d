"""HunyuanVideo-1.5's attention mask of all pairs of tokens, made in each block.

Upstream repeats rows and combines them with their transpose, and ``scaled_dot_product_attention``
converts what comes out, and copies it where its rows aren't aligned: each a pass over the square of
the tokens, most at a fraction of the memory's speed.
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROW_ALIGNMENT = 8  # elements; what attention kernels ask of the strides
_PROBED_TOKENS = 64
BOOL = (torch.bool, 0.0)

MaskForm = tuple[torch.dtype, float]
"""The dtype of a mask, and what stands in it for an invalid pair; for a valid one 0, in a bool mask
True.
"""


def pairwise_mask(text_mask: Tensor, tokens: int, form: MaskForm) -> Tensor:
    """[B, T] of the text's tokens, the last of all -> [B, 1, S, S], in the form of
    :func:`mask_form`: a pair is valid if both tokens are.

    All is filled as valid first, at the memory's speed; only the columns and rows of the text's
    tokens are looked at then.
    """
    dtype, invalid = form
    batch, text_tokens = text_mask.shape
    if dtype is torch.bool:
        mask = text_mask.new_ones(batch, 1, tokens, tokens, dtype=dtype)
    else:
        row = -(-tokens // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        mask = text_mask.new_zeros(batch, 1, tokens, row, dtype=dtype)[..., :tokens]
    padding = ~text_mask.bool()
    mask[..., tokens - text_tokens :].masked_fill_(padding[:, None, None, :], invalid)
    mask[:, :, tokens - text_tokens :].masked_fill_(padding[:, None, :, None], invalid)
    return mask


def mask_form(query: Tensor, processor: Any) -> MaskForm:
    """To what ``scaled_dot_product_attention`` would convert a bool mask for query, [B, S, H, D];
    ``BOOL`` where that isn't known.
    """
    attention_dispatch = sys.modules["diffusers.models.attention_dispatch"]  # the model's; torch 2.11 can't trace importing it
    device = query.device.type
    if device not in ("cpu", "cuda") or query.requires_grad or torch.is_autocast_enabled(device):
        return BOOL
    backend = processor._attention_backend or attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    if backend != attention_dispatch.AttentionBackendName.NATIVE or processor._parallel_config is not None:
        return BOOL
    if torch.compiler.is_compiling():  # PyTorch's own conversion would be traced, and it takes -inf
        return query.dtype, -torch.inf
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return BOOL
    cuda = torch.backends.cuda
    kernels = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled()
    return _probed_form(query.device, query.dtype, query.shape[-1], kernels)


@functools.lru_cache(maxsize=32)
def _probed_form(device: torch.device, dtype: torch.dtype, head_dim: int, kernels: tuple[bool, ...]) -> MaskForm:
    """Tries what gives the bits of a bool mask where all of a row is masked.

    PyTorch puts -inf there, for cuDNN's kernel some releases the lowest float16. ``kernels``: those
    enabled, among which PyTorch chooses.
    """
    with torch.inference_mode():
        states = torch.linspace(-3, 3, 3 * _PROBED_TOKENS * head_dim, device=device).sin().to(dtype)
        query, key, value = states.view(3, 1, 1, _PROBED_TOKENS, head_dim)
        valid = torch.arange(_PROBED_TOKENS, device=device) % 3 > 0
        bool_mask = (valid[:, None] & valid[None])[None, None]
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bool_mask)
        for invalid in (-torch.inf, torch.finfo(torch.float16).min):
            mask = torch.zeros_like(bool_mask, dtype=dtype).masked_fill_(~bool_mask, invalid)
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            if torch.equal(output.nan_to_num(nan=1e4), expected.nan_to_num(nan=1e4)):
                return dtype, invalid
    return BOOL
