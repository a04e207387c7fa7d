"""Attention of all of the family's blocks, over one stream or two."""

from typing import Any

import torch
from torch import Tensor

from ...functional import joint_qk_norm_rope, qk_norm_rope
from ...fused.adaln import law_argument
from ...fused.attention import ADDED, OWN, FusedAttention, law_in, laws_in
from ...fused.laws import law_for, shared_law
from ...fused.norms import weight_of
from ...fused.pairwise_mask import mask_form, pairwise_mask
from ...ops.quantization import Wanted
from ...swapping.swapped import untouched


class HunyuanVideoAttention(FusedAttention):
    """diffusers' ``Attention`` with the processor of HunyuanVideo, HunyuanImage or
    HunyuanVideo-1.5.

    Of a dual-stream block: joint attention, the text's tokens last. Of a single-stream block (no
    projections of the text's own) both streams are one sequence, of which only the leading part is
    rotated; such a block may hand it over in one piece.
    """

    fingerprints = {"forward": frozenset({"f24e3a146064"})}  # 0.37.0 to 0.42.1, as the next
    processors = {
        "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoAttnProcessor2_0": {"f78cf0232315": None},
        "diffusers.models.transformers.transformer_hunyuanimage:HunyuanImageAttnProcessor": {"f78cf0232315": None},
        "diffusers.models.transformers.transformer_hunyuan_video15:HunyuanVideo15AttnProcessor2_0": {"0ed3628ba196": "pairwise_mask"},
    }
    helpers = {"diffusers.models.embeddings:apply_rotary_emb": frozenset({"16054305ef24"})}
    norm = "diffusers_rms"
    rotary = "per_element"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        kwargs = dict(cross_attention_kwargs)
        rotary = kwargs.pop("image_rotary_emb", None)
        aligned = rotary is None or encoder_hidden_states is None or rotary[0].shape[0] == hidden_states.shape[1]
        known = self.fuses()
        if kwargs or known is None or not self.fits("joint_qk_norm_rope", aligned):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)  # type: ignore[misc]
        text_tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        dual = text_tokens > 0 and self.add_q_proj is not None
        if text_tokens > 0 and not dual:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)  # type: ignore[list-item]

        query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        weights = weight_of(self.norm_q), weight_of(self.norm_k)
        options: dict[str, Any] = {
            "head_dim": query.shape[-1] // self.heads,
            "norm": "diffusers_rms",
            "eps": self.eps(),
            "rounding": self.rounding,
        }
        if dual:
            query, key, value = joint_qk_norm_rope(
                query,
                key,
                value,
                *weights,
                rotary,
                self.add_q_proj(encoder_hidden_states),
                self.add_k_proj(encoder_hidden_states),
                self.add_v_proj(encoder_hidden_states),
                weight_of(self.norm_added_q),
                weight_of(self.norm_added_k),
                None,
                **options,
            )
        else:
            query, key = qk_norm_rope(query, key, *weights, rotary, **options)
            value = value.unflatten(2, (self.heads, -1))

        processor = self.processor
        if known.form == "pairwise_mask":
            attention_mask = pairwise_mask(attention_mask, query.shape[1], mask_form(query, processor))  # type: ignore[arg-type]
        hidden_states = self.upstream("dispatch_attention_fn")(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return hidden_states, None
        split = hidden_states.shape[1] - text_tokens
        hidden_states, encoder_hidden_states = hidden_states.split((split, text_tokens), dim=1)  # gradients are joined in one copy
        if getattr(self, "to_out", None) is not None:
            hidden_states = self.project(hidden_states)
        if getattr(self, "to_add_out", None) is not None:
            encoder_hidden_states = self.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states

    def takes_joined(self) -> bool:
        """Whether a single-stream block may hand over its sequence in one piece: nobody but us sees
        what goes in and comes out.
        """
        return untouched(self) and self.fuses() is not None


def dual_stream_laws(
    block: Any, x: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, Wanted], dict[str, Wanted]]:
    """The laws by which the attention module of a dual-stream block takes its two streams, as
    arguments of the norms before it.
    """
    law, text_law = laws_in(block.attn, (x, OWN), (text, ADDED))
    if (law is None and text_law is None) or (rotary is not None and rotary[0].shape[0] != x.shape[1]):
        return {}, {}
    return law_argument(block.norm1, law), law_argument(block.norm1_context, text_law)


def single_stream_law(block: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> dict[str, Wanted]:
    """The law by which attention and MLP of a single-stream block take the joined streams, as an
    argument of the block's norm.
    """
    law = law_in(block.attn, x, *OWN)
    return {} if law is None or rotary is None else law_argument(block.norm, shared_law(law, law_for(x, block.proj_mlp)))


def attend_joined(
    attn: Any, x: Tensor, text_tokens: int, attention_mask: Tensor | None, image_rotary_emb: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention over both streams as one. Upstream's takes and returns them apart, with a copy for
    each.
    """
    kwargs = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
    if image_rotary_emb is not None and isinstance(attn, HunyuanVideoAttention) and attn.takes_joined():
        return attn(hidden_states=x, **kwargs)[0]  # type: ignore[operator]
    both = attn(hidden_states=x[:, :-text_tokens], encoder_hidden_states=x[:, -text_tokens:], **kwargs)
    return torch.cat(both, dim=1)
