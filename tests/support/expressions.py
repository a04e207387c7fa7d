"""The unfused expressions of diffusers, as it writes them: what ``rounding="eager"`` must equal bit
for bit.

``layer_norm`` and ``rms_norm`` are torch's own, and with the host build of the CUDA kernels their
bits on CUDA (``aten_replay``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import aten_replay
from .cases import MODE

layer_norm = aten_replay.layer_norm if MODE == "cpu_sim" else F.layer_norm
rms_norm = aten_replay.rms_norm if MODE == "cpu_sim" else F.rms_norm


def qwen_modulate(x: Tensor, mod_params: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``QwenImageTransformerBlock._modulate``: ``x`` is already normed, ``mod_params`` [B, 3D], or
    [2B, 3D] with an index [B, S].
    """
    shift, scale, gate = mod_params.chunk(3, dim=-1)
    if index is not None:
        actual_batch = shift.size(0) // 2
        index_expanded = index.unsqueeze(-1)
        shift_result = torch.where(index_expanded == 0, shift[:actual_batch].unsqueeze(1), shift[actual_batch:].unsqueeze(1))
        scale_result = torch.where(index_expanded == 0, scale[:actual_batch].unsqueeze(1), scale[actual_batch:].unsqueeze(1))
        gate_result = torch.where(index_expanded == 0, gate[:actual_batch].unsqueeze(1), gate[actual_batch:].unsqueeze(1))
    else:
        shift_result, scale_result, gate_result = shift.unsqueeze(1), scale.unsqueeze(1), gate.unsqueeze(1)
    return x * (1 + scale_result) + shift_result, gate_result


def hunyuan_ada_layer_norm_zero(x: Tensor, scale_msa: Tensor, shift_msa: Tensor) -> Tensor:
    """``AdaLayerNormZero.forward`` after its linear layer: scale and shift [B, D]."""
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_msa[:, None]) + shift_msa[:, None]


def hunyuan_token_replace_norm(x: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int) -> Tensor:
    """``HunyuanVideoTokenReplaceAdaLayerNormZero.forward`` after its linear layers: embeddings [B,
    6D].
    """
    shift_msa, scale_msa = emb.chunk(6, dim=1)[:2]
    tr_shift_msa, tr_scale_msa = token_replace_emb.chunk(6, dim=1)[:2]
    normed = layer_norm(x, x.shape[-1:], eps=1e-6)
    zero = normed[:, :first_frame_num_tokens] * (1 + tr_scale_msa[:, None]) + tr_shift_msa[:, None]
    orig = normed[:, first_frame_num_tokens:] * (1 + scale_msa[:, None]) + shift_msa[:, None]
    return torch.cat([zero, orig], dim=1)


def wan_modulation(scale_shift_table: Tensor, temb: Tensor) -> list[Tensor]:
    """The six modulations of ``WanTransformerBlock``: table [1, 6, D] float32; temb [B, 6, D], or
    [B, S, 6, D] (TI2V).
    """
    if temb.ndim == 4:
        return [m.squeeze(2) for m in (scale_shift_table.unsqueeze(0) + temb.float()).chunk(6, dim=2)]
    return list((scale_shift_table + temb.float()).chunk(6, dim=1))


def wan_norm(hidden_states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm1 and norm3 of ``WanTransformerBlock``."""
    normed = layer_norm(hidden_states.float(), hidden_states.shape[-1:], eps=1e-6)
    return (normed * (1 + scale) + shift).type_as(hidden_states)


def wan_affine_norm(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """norm2 of ``WanTransformerBlock``."""
    return layer_norm(hidden_states.float(), hidden_states.shape[-1:], weight, bias, 1e-6).type_as(hidden_states)


def wan_residual(hidden_states: Tensor, attn_output: Tensor, gate: Tensor) -> Tensor:
    return (hidden_states.float() + attn_output * gate).type_as(hidden_states)


def ltx_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm1 of ``LTXVideoTransformerBlock``, with torch's fused RMSNorm: scale and shift [B, 1 or
    S, D].
    """
    return rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
