"""Wan 2.1 and 2.2 (per-token modulation of TI2V-5B included), WanAnimate, VACE, ChronoEdit."""

from typing import Any

import torch
from torch import Tensor

from ..functional import qk_norm_rope, scale_residual
from ..fused.attention import FusedAttention, law_in
from ..fused.block import FusedBlock, FusedUnit
from ..fused.feed_forward import law_in_feed_forward
from ..fused.gelu import FusedGELU
from ..fused.laws import quantized_for
from ..fused.norms import weight_of
from ..layers import LayerNormScaleShift, ScaleResidualIdentity, ScaleResidualNormScaleShift
from ..ops.bits import bits
from ..ops.context import transformed
from ..ops.layout import laid_out_as
from ..ops.quantization import Wanted
from ..swapping.callers import caller_of
from ..swapping.swapped import untouched

NOTHING_TO_GAIN = dict.fromkeys(
    ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel", "ChronoEditTransformer3DModel"),
    "its blocks add tables to one modulation that all share",
)


class WanAttention(FusedAttention):
    """diffusers' ``WanAttention`` with its ``WanAttnProcessor``: self-attention with a rotary
    embedding, cross-attention without.
    """

    fingerprints = {"forward": frozenset({"b49ebcc6575c"})}  # 0.37.0 to 0.42.1, as the next, in Wan, WanAnimate and ChronoEdit
    processors = {"WanAttnProcessor": {"8f9485cfdd6c": None}}
    helpers = {}
    norm = "rms"
    across = True
    rotary = "per_pair"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # Text of another batch than the video's is broadcast inside the attention.
        same_batch = encoder_hidden_states is None or encoder_hidden_states.shape[0] == hidden_states.shape[0]
        aligned = rotary_emb is None or (encoder_hidden_states is None and rotary_emb[0].shape[1] == hidden_states.shape[1])
        if kwargs or self.fuses() is None or not self.fits("qk_norm_rope", same_batch and aligned):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)  # type: ignore[misc]
        image_states = None
        if self.add_k_proj is not None:  # image-to-video: 512 tokens of text, after those of the image
            image_tokens = encoder_hidden_states.shape[1] - 512  # type: ignore[union-attr]
            image_states, encoder_hidden_states = encoder_hidden_states[:, :image_tokens], encoder_hidden_states[:, image_tokens:]  # type: ignore[index]

        if encoder_hidden_states is not None and not self.fused_projections:
            encoder_hidden_states = quantized_for(encoder_hidden_states, self.to_k, self.to_v)
        query, key, value = self.upstream("_get_qkv_projections")(self, hidden_states, encoder_hidden_states)
        query_weight, key_weight = weight_of(self.norm_q), weight_of(self.norm_k)
        if query_weight is None or key_weight is None:  # the op tells a norm across heads by its weights; ones change no bit
            query_weight = query.new_ones(query.shape[-1]) if query_weight is None else query_weight
            key_weight = key.new_ones(key.shape[-1]) if key_weight is None else key_weight
        rotary = None
        if rotary_emb is not None:
            cos, sin = rotary_emb
            rotary = cos[..., 0::2], sin[..., 1::2]
        query, key = qk_norm_rope(
            query,
            key,
            query_weight,
            key_weight,
            rotary,
            head_dim=query.shape[-1] // self.heads,
            norm="rms",
            eps=self.eps(),
            rounding=self.rounding,
        )
        value = value.unflatten(2, (self.heads, -1))

        attend, processor = self.upstream("dispatch_attention_fn"), self.processor
        options: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False, "backend": processor._attention_backend}
        of_image = None
        if image_states is not None:
            image_key, image_value = self.upstream("_get_added_kv_projections")(self, image_states)
            image_key = self.norm_added_k(image_key).unflatten(2, (self.heads, -1))
            image_value = image_value.unflatten(2, (self.heads, -1))
            of_image = attend(query, image_key, image_value, attn_mask=None, parallel_config=None, **options)
            of_image = of_image.flatten(2, 3).type_as(query)
        parallel = processor._parallel_config if encoder_hidden_states is None else None
        hidden_states = attend(query, key, value, attn_mask=attention_mask, parallel_config=parallel, **options)
        hidden_states = hidden_states.flatten(2, 3).type_as(query)
        if of_image is not None:
            hidden_states = hidden_states + of_image
        return self.project(hidden_states)


def _law(attn: Any, x: Tensor, rotary_emb: Any) -> Wanted | None:
    """The law by which self-attention takes an input of the shape and dtype of ``x``."""
    law = law_in(attn, x, *(("to_qkv",) if getattr(attn, "fused_projections", False) else ("to_q", "to_k", "to_v")))
    return law if law is None or rotary_emb is None or rotary_emb[0].shape[1] == x.shape[1] else None


def _law_across(attn: Any, x: Tensor, text: Tensor) -> Wanted | None:
    """The law by which cross-attention takes it: only the query is made of ``x``."""
    return law_in(attn, x, "to_q") if text.shape[0] == x.shape[0] else None


_SITES = {
    "norm1": LayerNormScaleShift,
    "norm2": ScaleResidualNormScaleShift,
    "norm3": ScaleResidualNormScaleShift,
    "attn1": WanAttention,
    "attn2": WanAttention,
}


class WanTransformerBlock(FusedBlock):
    """diffusers' ``WanTransformerBlock``: ``hidden_states`` [B, S, D], ``temb`` [B, 6, D] or per
    token [B, S or 1, 6, D].
    """

    family = "Wan"
    names = frozenset({"WanTransformerBlock"})
    fingerprints = {"forward": frozenset({"1dbab6525f27"})}  # 0.37.0 to 0.42.1, in Wan, WanAnimate and ChronoEdit
    sites = _SITES
    unmodulated = frozenset({"norm2"})
    table = "scale_shift_table"
    residuals = 1

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        if not self.intact():
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)  # type: ignore[misc]
        stream = hidden_states
        modulation1, gate1, modulation3, gate3 = _modulation(temb, self.scale_shift_table)

        x = self.norm1(hidden_states, **modulation1, law=_law(self.attn1, hidden_states, rotary_emb))
        x = self.attn1(x, None, None, rotary_emb)
        x, hidden_states = self.norm2(hidden_states, x, **gate1, law=_law_across(self.attn2, hidden_states, encoder_hidden_states))
        x = self.attn2(x, encoder_hidden_states, None, None)
        x, hidden_states = self.norm3(hidden_states, x, **modulation3, law=law_in_feed_forward(self.ffn, hidden_states))
        hidden_states = scale_residual(hidden_states, self.ffn(x), **gate3, rounding=self.rounding)
        # Elsewhere norms are all that read it, and they return dense rows.
        return laid_out_as(stream, hidden_states) if isinstance(self.norm2, ScaleResidualIdentity) else hidden_states


class WanVACETransformerBlock(FusedBlock):
    """diffusers' ``WanVACETransformerBlock``: as Wan's on ``control_hidden_states`` [B, S, D], with
    projections around it.
    """

    family = "Wan"
    names = frozenset({"WanVACETransformerBlock"})
    fingerprints = {"forward": frozenset({"d95611b95b5d"})}  # 0.37.0 to 0.42.1
    sites = _SITES
    unmodulated = frozenset({"norm2"})
    table = "scale_shift_table"
    residuals = 1

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb
            )
        if self.proj_in is not None:
            control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
        modulation1, gate1, modulation3, gate3 = _modulation(temb, self.scale_shift_table.to(temb.device))

        x = self.norm1(control_hidden_states, **modulation1, law=_law(self.attn1, control_hidden_states, rotary_emb))
        x = self.attn1(x, None, None, rotary_emb)
        law = _law_across(self.attn2, control_hidden_states, encoder_hidden_states)
        x, control_hidden_states = self.norm2(control_hidden_states, x, **gate1, law=law)
        x = self.attn2(x, encoder_hidden_states, None, None)
        law = law_in_feed_forward(self.ffn, control_hidden_states)
        x, control_hidden_states = self.norm3(control_hidden_states, x, **modulation3, law=law)
        control_hidden_states = scale_residual(control_hidden_states, self.ffn(x), **gate3, rounding=self.rounding)

        conditioning_states = None if self.proj_out is None else self.proj_out(control_hidden_states)
        return conditioning_states, control_hidden_states


class WanTimeTextImageEmbedding(FusedUnit):
    """diffusers' ``WanTimeTextImageEmbedding``, of whose per-token modulations one row stays where
    all tokens of a sample have the same.

    TI2V-5B gives each token a timestep of its own, also in text-to-video, where all are equal:
    ``temb`` [B, S, D] and ``timestep_proj`` [B, S, 6 D], gigabytes that live through the whole
    forward pass and are read in every block. Here they are [B, 1, D] and [B, 1, 6 D], which
    upstream's code broadcasts. Whether rows are equal is asked of the bits that upstream computed,
    for which the host waits at the beginning of a forward pass.
    """

    family = "Wan"
    names = frozenset()  # WanAnimate's class of this name has no timesteps per token; nothing is lost with it
    fingerprints = {"forward": frozenset({"cad5ec5dcd1f"})}  # 0.37.0 to 0.42.1, in Wan and ChronoEdit
    holders = frozenset({"c9bb19925b53", "1b954adb29e2"})  # the same, and Wan from 0.40.0 on
    anywhere = (FusedGELU,)
    unfused_by_hooks = True

    def forward(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        timestep_seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        temb, timestep_proj, text, image = super().forward(  # type: ignore[misc]
            timestep, encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len
        )
        rows = temb, timestep_proj
        if timestep_seq_len is not None and _have_values(temb) and self._goes_to_known_code() and all(map(_rows_are_equal, rows)):
            temb, timestep_proj = temb[:, :1].clone(), timestep_proj[:, :1].clone()
        return temb, timestep_proj, text, image

    def _goes_to_known_code(self) -> bool:
        """Whether what is returned is seen by nobody but a model and blocks that are known to
        broadcast it.
        """
        model: Any = caller_of(self, self.holders) if self.intact() and untouched(self) else None  # type: ignore[arg-type]
        return model is not None and all(isinstance(block, WanTransformerBlock) and untouched(block) for block in model.blocks)


def _have_values(rows: Tensor) -> bool:
    """Whether there are bits to compare now. Not for gradients: that of one row would be a sum over
    the tokens.
    """
    if torch.is_grad_enabled() or transformed() or type(rows) is not Tensor or rows.device.type == "meta":
        return False
    return not (rows.is_cuda and torch.cuda.is_current_stream_capturing())


def _rows_are_equal(rows: Tensor) -> bool:
    """Whether the rows [B, S, D] of each sample are the same bits."""
    # A part at a time: a comparison makes a byte of each value.
    parts = bits(rows).chunk(6, dim=-1)
    return bool(torch.stack([(part == part[:, :1]).all() for part in parts]).all())


def _modulation(temb: Tensor, table: Tensor) -> tuple[dict[str, Tensor], ...]:
    """Arguments of norm1, of the gate after attn1, of norm3, of the gate after ffn. All are views:
    the kernels add the table [1, 6, D].
    """
    if table.shape[0] != 1:  # a table for each sample, which no kernel adds
        shift1, scale1, gate1, shift3, scale3, gate3 = (table + temb.float()).unbind(-2)
        return {"scale": scale1, "shift": shift1}, {"gate": gate1}, {"scale": scale3, "shift": shift3}, {"gate": gate3}
    shift1, scale1, gate1, shift3, scale3, gate3 = temb.unbind(-2)
    shift1_table, scale1_table, gate1_table, shift3_table, scale3_table, gate3_table = table[0].unbind()
    return (
        {"scale": scale1, "shift": shift1, "scale_table": scale1_table, "shift_table": shift1_table},
        {"gate": gate1, "gate_table": gate1_table},
        {"scale": scale3, "shift": shift3, "scale_table": scale3_table, "shift_table": shift3_table},
        {"gate": gate3, "gate_table": gate3_table},
    )
