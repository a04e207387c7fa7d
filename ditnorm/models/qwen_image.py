"""Qwen-Image: text-to-image, Edit, Edit-Plus, Layered, Inpaint, and its ControlNets."""

from typing import Any

import torch
from torch import Tensor

from ..functional import joint_qk_norm_rope, scale_residual
from ..fused.attention import ADDED, OWN, FusedAttention, laws_in
from ..fused.block import FusedBlock
from ..fused.feed_forward import law_in_feed_forward
from ..fused.laws import dense_for
from ..fused.modulation import ModulatedModel
from ..fused.norms import weight_of
from ..fused.promotion import modulated, promoted
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from ..ops.quantization import Wanted

MODULATED = (
    ModulatedModel(
        names=frozenset({"QwenImageTransformer2DModel"}),
        forward=frozenset({"9f7f35b26230", "a8d45c0f203b", "9d0dfb7e01ef"}),  # 0.37.0; 0.38.0; 0.39.0 to 0.42.1
        embedding="time_text_embed",
        takers=("transformer_blocks", "norm_out"),
        halved_if="zero_cond_t",
        halved=("txt_mod", "norm_out"),
    ),
    ModulatedModel(
        names=frozenset({"QwenImageControlNetModel"}),
        forward=frozenset({"24d11ac24b40", "d9bd67691870", "8807cbc00fb0"}),  # 0.37.0, 0.38.0; 0.39.0, 0.40.0; 0.41.0 to 0.42.1
        embedding="time_text_embed",
        takers=("transformer_blocks",),
    ),
)


class QwenImageAttention(FusedAttention):
    """diffusers' ``Attention`` with Qwen-Image's ``QwenDoubleStreamAttnProcessor2_0``: joint
    attention, the text's tokens first.
    """

    fingerprints = {"forward": frozenset({"f24e3a146064"})}  # 0.37.0 to 0.42.1
    processors = {
        "diffusers.models.transformers.transformer_qwenimage:QwenDoubleStreamAttnProcessor2_0": {
            "31271f9b515f": "given_mask",  # 0.37.0, 0.38.0
            "2d03c44140b2": "joint_mask",  # 0.39.0
            "893facd2e182": "joint_mask",  # 0.40.0, 0.41.0
            "0a3b3add4cc9": "joint_mask",  # 0.42.0, 0.42.1
        }
    }
    helpers = {"apply_rotary_emb_qwen": frozenset({"4da6116279ad"})}  # 0.37.0 to 0.42.1
    norm = "diffusers_rms"
    rotary = "complex"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        kwargs = dict(cross_attention_kwargs)
        mask, rotary = kwargs.pop("encoder_hidden_states_mask", None), kwargs.pop("image_rotary_emb", None)
        known = self.fuses()
        form = None if known is None else known.form
        fits = (attention_mask is None or form == "given_mask") and _aligned(hidden_states, encoder_hidden_states, rotary)
        if encoder_hidden_states is None or kwargs or known is None or not self.fits("joint_qk_norm_rope", fits):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)  # type: ignore[misc]
        if mask is not None and form == "joint_mask":
            of_image = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
            attention_mask = torch.cat([mask, of_image], dim=1)[:, None, None, :]

        image_rotary, text_rotary = (None, None) if rotary is None else rotary
        # In upstream's order, which offloading with prefetching relies on.
        image_query, image_key, image_value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        text_query, text_key = self.add_q_proj(encoder_hidden_states), self.add_k_proj(encoder_hidden_states)
        text_value = self.add_v_proj(encoder_hidden_states)
        query, key, value = joint_qk_norm_rope(
            image_query,
            image_key,
            image_value,
            weight_of(self.norm_q),
            weight_of(self.norm_k),
            image_rotary,
            text_query,
            text_key,
            text_value,
            weight_of(self.norm_added_q),
            weight_of(self.norm_added_k),
            text_rotary,
            head_dim=self.inner_dim // self.heads,
            norm="diffusers_rms",
            eps=self.eps(),
            encoder_first=True,
            rounding=self.rounding,
        )
        processor = self.processor
        joint = self.upstream("dispatch_attention_fn")(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        joint = joint.flatten(2, 3).to(query.dtype)
        text_tokens = encoder_hidden_states.shape[1]
        text, image = joint.split((text_tokens, joint.shape[1] - text_tokens), dim=1)  # whose gradients are joined in one copy
        to_add_out, (to_out, *dropout) = self.to_add_out, self.to_out._modules.values()
        image = to_out(dense_for(image, to_out))
        if dropout:
            image = dropout[0](image)
        return image, to_add_out(dense_for(text, to_add_out))


def _laws(
    attn: Any, image: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None, kwargs: dict[str, Any] | None
) -> tuple[Wanted | None, Wanted | None]:
    """The laws by which the attention module takes its two streams."""
    law, text_law = laws_in(attn, (image, OWN), (text, ADDED))
    taken = (law is not None or text_law is not None) and not kwargs and _aligned(image, text, rotary)
    return (law, text_law) if taken else (None, None)


def _aligned(image: Any, text: Any, rotary: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the rotary tables are of the streams' lengths. Where they aren't, upstream says so in
    its own words.
    """
    return rotary is None or text is None or (rotary[0].shape[0] == image.shape[1] and rotary[1].shape[0] == text.shape[1])


class QwenImageTransformerBlock(FusedBlock):
    """diffusers' ``QwenImageTransformerBlock``: ``hidden_states`` [B, S, D] and
    ``encoder_hidden_states`` [B, T, D]; ``temb`` [B, D].

    With ``modulate_index`` [B, S] of 0 and 1, ``temb`` is [2 * B, D], and the token with 0 takes
    its modulation from the first half.
    """

    family = "Qwen-Image"
    names = frozenset({"QwenImageTransformerBlock"})
    modulations = ("img_mod", "txt_mod")
    fingerprints = {"forward": frozenset({"da7d42c5625b"}), "_modulate": frozenset({"2c2fb35e6967"})}  # 0.37.0 to 0.42.1
    sites = {
        "img_norm1": LayerNormScaleShift,
        "txt_norm1": LayerNormScaleShift,
        "img_norm2": ScaleResidualNormScaleShift,
        "txt_norm2": ScaleResidualNormScaleShift,
        "attn": QwenImageAttention,
    }
    residuals = 2

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
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
        img_mod_params = self.img_mod(temb)
        if self.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        txt_mod_params = self.txt_mod(temb)

        if modulate_index is not None:  # [2 * B, 6 * D] -> [B, 2, 6 * D]: the rows that the index selects from
            img_mod_params = img_mod_params.unflatten(0, (2, -1)).transpose(0, 1)
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod_params.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod_params.chunk(6, dim=-1)

        img_law, txt_law = _laws(self.attn, hidden_states, encoder_hidden_states, image_rotary_emb, joint_attention_kwargs)
        # One name for all stages of a stream: what was read is freed before the MLP, the peak.
        image, text = self.attn(
            hidden_states=modulated(self.img_norm1, hidden_states, img_scale1, img_shift1, modulate_index, img_law),
            encoder_hidden_states=modulated(self.txt_norm1, encoder_hidden_states, txt_scale1, txt_shift1, law=txt_law),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )

        hidden_states = promoted(hidden_states, img_gate1, self.rounding)
        encoder_hidden_states = promoted(encoder_hidden_states, txt_gate1, self.rounding)
        img_law, txt_law = law_in_feed_forward(self.img_mlp, hidden_states), law_in_feed_forward(self.txt_mlp, encoder_hidden_states)
        image, hidden_states = self.img_norm2(
            hidden_states, image, gate=img_gate1, scale=img_scale2, shift=img_shift2, index=modulate_index, law=img_law
        )
        hidden_states = scale_residual(hidden_states, self.img_mlp(image), img_gate2, index=modulate_index, rounding=self.rounding)

        text, encoder_hidden_states = self.txt_norm2(
            encoder_hidden_states, text, gate=txt_gate1, scale=txt_scale2, shift=txt_shift2, law=txt_law
        )
        encoder_hidden_states = scale_residual(encoder_hidden_states, self.txt_mlp(text), txt_gate2, rounding=self.rounding)

        if encoder_hidden_states.dtype == torch.float16:
            encoder_hidden_states = encoder_hidden_states.clip(-65504, 65504)
        if hidden_states.dtype == torch.float16:
            hidden_states = hidden_states.clip(-65504, 65504)
        return encoder_hidden_states, hidden_states
