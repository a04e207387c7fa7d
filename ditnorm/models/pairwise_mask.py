"""HunyuanVideo-1.5's attention mask of all pairs of tokens, made in each block.

Upstream repeats rows and combines them with their transpose, and ``scaled_dot_product_attention`` converts what comes out, and copies it
where its rows aren't aligned: each a pass over the square of the tokens, most at a fraction of the memory's speed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

_ROW_ALIGNMENT = 8  # elements; what the memory-efficient kernel asks of the strides


def pairwise_mask(text_mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """[B, T] of the text's tokens, the last -> [B, 1, S, S]: True where both tokens of a pair are valid, or in another dtype 0, else -inf.

    All is filled as valid first, at the memory's speed; only the columns and rows of the text's tokens are looked at then.
    """
    if torch.compiler.is_compiling():  # computed where it is read: the fewer steps the better
        valid = F.pad(text_mask, (tokens - text_mask.shape[1], 0), value=True).bool()
        return valid[:, None, None, :] & valid[:, None, :, None]
    batch, text_tokens = text_mask.shape
    if dtype is torch.bool:
        mask, invalid = text_mask.new_ones(batch, 1, tokens, tokens, dtype=dtype), 0.0
    else:
        row = -(-tokens // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        mask, invalid = text_mask.new_zeros(batch, 1, tokens, row, dtype=dtype)[..., :tokens], -torch.inf
    padding = ~text_mask.bool()
    mask[..., tokens - text_tokens :].masked_fill_(padding[:, None, None, :], invalid)
    mask[:, :, tokens - text_tokens :].masked_fill_(padding[:, None, :, None], invalid)
    return mask


def mask_dtype(query: Tensor, key: Tensor, value: Tensor, processor: Any) -> torch.dtype:
    """The dtype of query, [B, S, H, D], if ``scaled_dot_product_attention`` would convert a bool mask to 0 and -inf in it; else bool."""
    from diffusers.models import attention_dispatch  # not before a model of diffusers is there

    device = query.device.type
    if torch.compiler.is_compiling() or device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return torch.bool
    backend = processor._attention_backend or attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    if backend != attention_dispatch.AttentionBackendName.NATIVE or processor._parallel_config is not None:
        return torch.bool
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    any_mask = query.new_empty((), dtype=torch.bool).expand(query.shape[0], 1, query.shape[2], key.shape[2])
    chosen = torch._fused_sdp_choice(query, key, value, any_mask)
    # For cuDNN some releases of PyTorch put -65504 in place of -inf, which shows where all of a row is masked.
    return torch.bool if chosen == SDPBackend.CUDNN_ATTENTION.value else query.dtype
