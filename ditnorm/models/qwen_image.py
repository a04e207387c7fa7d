"""Qwen-Image: text-to-image, Edit, Edit-Plus, Layered, Inpaint, and its ControlNets."""

from typing import Any

import torch
from torch import Tensor

from ..functional import scale_residual
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from .base import FusedBlock


class QwenImageTransformerBlock(FusedBlock):
    """diffusers' ``QwenImageTransformerBlock``: ``hidden_states`` [B, S, D] and ``encoder_hidden_states`` [B, T, D]; ``temb`` [B, D].

    With ``modulate_index`` [B, S] of 0 and 1, ``temb`` is [2 * B, D], and the token with 0 takes its modulation from the first half.
    """

    family = "Qwen-Image"
    names = frozenset({"QwenImageTransformerBlock"})
    fingerprints = {"forward": frozenset({"da7d42c5625b"}), "_modulate": frozenset({"2c2fb35e6967"})}  # 0.37.0 to 0.42.1
    sites = {
        "img_norm1": LayerNormScaleShift,
        "txt_norm1": LayerNormScaleShift,
        "img_norm2": ScaleResidualNormScaleShift,
        "txt_norm2": ScaleResidualNormScaleShift,
    }
    site_count = 6

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        img_mod_params = self.img_mod(temb)
        if self.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        txt_mod_params = self.txt_mod(temb)

        if modulate_index is not None:  # [2 * B, 6 * D] -> [B, 2, 6 * D]: the rows that the index selects from
            img_mod_params = img_mod_params.unflatten(0, (2, -1)).transpose(0, 1)
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod_params.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod_params.chunk(6, dim=-1)

        img_attn_output, txt_attn_output = self.attn(
            hidden_states=self.img_norm1(hidden_states, scale=img_scale1, shift=img_shift1, index=modulate_index),
            encoder_hidden_states=self.txt_norm1(encoder_hidden_states, scale=txt_scale1, shift=txt_shift1),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

        img_modulated, hidden_states = self.img_norm2(
            hidden_states, img_attn_output, gate=img_gate1, scale=img_scale2, shift=img_shift2, index=modulate_index
        )
        hidden_states = scale_residual(hidden_states, self.img_mlp(img_modulated), img_gate2, index=modulate_index, rounding=self.rounding)

        txt_modulated, encoder_hidden_states = self.txt_norm2(
            encoder_hidden_states, txt_attn_output, gate=txt_gate1, scale=txt_scale2, shift=txt_shift2
        )
        encoder_hidden_states = scale_residual(encoder_hidden_states, self.txt_mlp(txt_modulated), txt_gate2, rounding=self.rounding)

        if encoder_hidden_states.dtype == torch.float16:
            encoder_hidden_states = encoder_hidden_states.clip(-65504, 65504)
        if hidden_states.dtype == torch.float16:
            hidden_states = hidden_states.clip(-65504, 65504)
        return encoder_hidden_states, hidden_states
