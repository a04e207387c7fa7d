"""HunyuanVideo (text-to-video, both image-to-video kinds, Framepack), HunyuanVideo-1.5,
HunyuanImage-2.1.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..functional import joint_qk_norm_rope, qk_norm_rope, scale_residual
from ..fused.activation import JoinedGELU, begun, joined
from ..fused.adaln import AdaLayerNormZero, AdaLayerNormZeroSingle, law_argument
from ..fused.attention import FusedAttention, law_in, weight_of
from ..fused.block import FusedBlock, FusedUnit
from ..fused.feed_forward import law_in_feed_forward
from ..fused.modulation import ModulatedModel, Modulating
from ..fused.pairwise_mask import mask_form, pairwise_mask
from ..fused.promotion import modulated, promoted
from ..fused.quantized_linear import law_for, shared_law
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from ..ops.quantization import Wanted
from ..swapping.swapped import untouched

MODULATED = (
    ModulatedModel(
        names=frozenset({"HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"}),
        forward=frozenset({"30f3bd1c7313", "26e5a6cf8721"}),  # 0.37.0 to 0.42.1
        embedding="time_text_embed",
        takers=("transformer_blocks", "single_transformer_blocks", "norm_out"),
    ),
    ModulatedModel(
        names=frozenset({"HunyuanVideo15Transformer3DModel"}),
        forward=frozenset({"490537a446a4"}),  # 0.37.0 to 0.42.1
        embedding="time_embed",
        takers=("transformer_blocks", "norm_out"),
    ),
    ModulatedModel(
        names=frozenset({"HunyuanImageTransformer2DModel"}),
        forward=frozenset({"55d1a12efe80"}),  # 0.37.0 to 0.42.1
        embedding="time_guidance_embed",
        takers=("transformer_blocks", "single_transformer_blocks", "norm_out"),
    ),
)
"""The refiners of the text have an embedding of their own, and one modulation each: they stay as
they are.
"""


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
            hidden_states = self.to_out[1](self.to_out[0](hidden_states))
        if getattr(self, "to_add_out", None) is not None:
            encoder_hidden_states = self.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states

    def takes_joined(self) -> bool:
        """Whether a single-stream block may hand over its sequence in one piece: nobody but us sees
        what goes in and comes out.
        """
        return untouched(self) and self.fuses() is not None


class HunyuanVideoTransformerBlock(FusedBlock):
    """diffusers' ``HunyuanVideoTransformerBlock``: ``hidden_states`` [B, S, D],
    ``encoder_hidden_states`` [B, T, D], ``temb`` [B, D].
    """

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTransformerBlock", "HunyuanVideo15TransformerBlock"})
    fingerprints = {"forward": frozenset({"92fbf8acfc44"})}  # 0.37.0 to 0.42.1, in both
    sites = {
        "norm1": AdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
        "norm2": ScaleResidualNormScaleShift,
        "norm2_context": ScaleResidualNormScaleShift,
        "attn": HunyuanVideoAttention,
    }
    residuals = 2

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, *args, **kwargs
            )
        given, c_given = _laws(self, hidden_states, encoder_hidden_states, freqs_cis)
        x, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb, **given)
        c, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb, **c_given)

        x, c = self.attn(hidden_states=x, encoder_hidden_states=c, attention_mask=attention_mask, image_rotary_emb=freqs_cis)

        hidden_states = promoted(hidden_states, gate_msa, self.rounding)
        encoder_hidden_states = promoted(encoder_hidden_states, c_gate_msa, self.rounding)
        law, c_law = law_in_feed_forward(self.ff, hidden_states), law_in_feed_forward(self.ff_context, encoder_hidden_states)
        x, hidden_states = self.norm2(hidden_states, x, gate=gate_msa, scale=scale_mlp, shift=shift_mlp, law=law)
        c, encoder_hidden_states = self.norm2_context(
            encoder_hidden_states, c, gate=c_gate_msa, scale=c_scale_mlp, shift=c_shift_mlp, law=c_law
        )

        hidden_states = scale_residual(hidden_states, self.ff(x), gate_mlp, rounding=self.rounding)
        encoder_hidden_states = scale_residual(encoder_hidden_states, self.ff_context(c), c_gate_mlp, rounding=self.rounding)
        return hidden_states, encoder_hidden_states


class HunyuanImageTransformerBlock(HunyuanVideoTransformerBlock):
    """diffusers' ``HunyuanImageTransformerBlock``: HunyuanVideo's, but for the name of a
    parameter.
    """

    names = frozenset({"HunyuanImageTransformerBlock"})
    fingerprints = {"forward": frozenset({"4cc8a7b5551f"})}  # 0.37.0 to 0.42.1

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return super().forward(hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb)


class _Single(JoinedGELU):
    """A single-stream block: its residual is the streams themselves, where upstream's is the copy
    that its norm was given.
    """

    _modules: dict[str, Any]
    sites: ClassVar[Mapping[str, type]]

    def intact(self) -> bool:
        """As of :class:`FusedModule`; besides, nobody else is given what the norm is given, and
        could write to it.
        """
        norm: Any = self._modules.get("norm")
        known = super().intact() and isinstance(norm, self.sites["norm"])  # type: ignore[misc]
        return known and norm.intact() and untouched(norm, norm.norm)


class HunyuanVideoSingleTransformerBlock(_Single, FusedBlock):
    """diffusers' ``HunyuanVideoSingleTransformerBlock``: attention and MLP side by side over both
    streams as one.
    """

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoSingleTransformerBlock", "HunyuanImageSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"ec73d8a5e99f"})}  # 0.37.0 to 0.42.1, in both
    sites = {"norm": AdaLayerNormZeroSingle, "attn": HunyuanVideoAttention}
    residuals = 2

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, *args, **kwargs
            )
        text_seq_length = encoder_hidden_states.shape[1]
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        x, gate = self.norm(x, emb=temb, **_law_joined(self, x, image_rotary_emb))
        mlp, pending = begun(self.act_mlp, self.proj_mlp, x, self.rounding)
        x = _attend_joined(self.attn, x, text_seq_length, attention_mask, image_rotary_emb)
        x = joined(x, mlp, pending, self.rounding, self.proj_out)
        del mlp  # as x before it: nothing is kept for no reason while proj_out runs
        x = self.proj_out(x)

        return _scale_residuals(hidden_states, encoder_hidden_states, x, gate, rounding=self.rounding)


class HunyuanVideoTokenReplaceAdaLayerNormZero(Modulating, FusedUnit):
    """diffusers' class of this name: the first ``first_frame_num_tokens`` tokens take their
    modulation from ``token_replace_emb``.
    """

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceAdaLayerNormZero"})
    fingerprints = {"forward": frozenset({"b5abc890a2a7"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(
        self, hidden_states: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int, law: Wanted | None = None
    ) -> tuple[Tensor, ...]:
        if not self.intact():
            return super().forward(hidden_states, emb, token_replace_emb, first_frame_num_tokens)  # type: ignore[misc]
        emb = self.modulation(emb)
        token_replace_emb = self.modulation(token_replace_emb)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
        tr_shift_msa, tr_scale_msa, tr_gate_msa, tr_shift_mlp, tr_scale_mlp, tr_gate_mlp = token_replace_emb.chunk(6, dim=1)

        shift, scale = _rows((tr_shift_msa, shift_msa), (tr_scale_msa, scale_msa))
        x = modulated(self.norm, hidden_states, scale, shift, _row_index(hidden_states, first_frame_num_tokens), law)
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp, tr_gate_msa, tr_shift_mlp, tr_scale_mlp, tr_gate_mlp


class HunyuanVideoTokenReplaceAdaLayerNormZeroSingle(Modulating, FusedUnit):
    """diffusers' class of this name: the first ``first_frame_num_tokens`` tokens take their
    modulation from ``token_replace_emb``.
    """

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceAdaLayerNormZeroSingle"})
    fingerprints = {"forward": frozenset({"76d837e976ec"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(
        self, hidden_states: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int, law: Wanted | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.intact():
            return super().forward(hidden_states, emb, token_replace_emb, first_frame_num_tokens)  # type: ignore[misc]
        emb = self.modulation(emb)
        token_replace_emb = self.modulation(token_replace_emb)
        shift_msa, scale_msa, gate_msa = emb.chunk(3, dim=1)
        tr_shift_msa, tr_scale_msa, tr_gate_msa = token_replace_emb.chunk(3, dim=1)

        shift, scale = _rows((tr_shift_msa, shift_msa), (tr_scale_msa, scale_msa))
        x = modulated(self.norm, hidden_states, scale, shift, _row_index(hidden_states, first_frame_num_tokens), law)
        return x, gate_msa, tr_gate_msa


class HunyuanVideoTokenReplaceTransformerBlock(FusedBlock):
    """diffusers' ``HunyuanVideoTokenReplaceTransformerBlock``: the dual-stream block with two
    modulations for the image stream.
    """

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceTransformerBlock"})
    fingerprints = {"forward": frozenset({"232efbf680df"})}  # 0.37.0 to 0.42.1
    sites = {
        "norm1": HunyuanVideoTokenReplaceAdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
        "norm2": ScaleResidualNormScaleShift,
        "norm2_context": ScaleResidualNormScaleShift,
        "attn": HunyuanVideoAttention,
    }
    residuals = 2

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
        token_replace_emb: Tensor = None,  # type: ignore[assignment]  # upstream's default; always given
        num_tokens: int = None,  # type: ignore[assignment]  # noqa: RUF013
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, token_replace_emb, num_tokens
            )
        given, c_given = _laws(self, hidden_states, encoder_hidden_states, freqs_cis)
        x, gate_msa, shift_mlp, scale_mlp, gate_mlp, tr_gate_msa, tr_shift_mlp, tr_scale_mlp, tr_gate_mlp = self.norm1(
            hidden_states, temb, token_replace_emb, num_tokens, **given
        )
        c, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb, **c_given)

        x, c = self.attn(hidden_states=x, encoder_hidden_states=c, attention_mask=attention_mask, image_rotary_emb=freqs_cis)

        hidden_states = promoted(hidden_states, gate_msa, self.rounding)
        encoder_hidden_states = promoted(encoder_hidden_states, c_gate_msa, self.rounding)
        index = _row_index(hidden_states, num_tokens)
        gate1, shift, scale, gate2 = _rows(
            (tr_gate_msa, gate_msa), (tr_shift_mlp, shift_mlp), (tr_scale_mlp, scale_mlp), (tr_gate_mlp, gate_mlp)
        )
        law, c_law = law_in_feed_forward(self.ff, hidden_states), law_in_feed_forward(self.ff_context, encoder_hidden_states)
        x, hidden_states = self.norm2(hidden_states, x, gate=gate1, scale=scale, shift=shift, index=index, law=law)
        c, encoder_hidden_states = self.norm2_context(
            encoder_hidden_states, c, gate=c_gate_msa, scale=c_scale_mlp, shift=c_shift_mlp, law=c_law
        )

        hidden_states = scale_residual(hidden_states, self.ff(x), gate2, index=index, rounding=self.rounding)
        encoder_hidden_states = scale_residual(encoder_hidden_states, self.ff_context(c), c_gate_mlp, rounding=self.rounding)
        return hidden_states, encoder_hidden_states


class HunyuanVideoTokenReplaceSingleTransformerBlock(_Single, FusedBlock):
    """diffusers' ``HunyuanVideoTokenReplaceSingleTransformerBlock``: the single-stream block with
    two modulations.
    """

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"154c1f7ef55b"})}  # 0.37.0 to 0.42.1
    sites = {"norm": HunyuanVideoTokenReplaceAdaLayerNormZeroSingle, "attn": HunyuanVideoAttention}
    residuals = 2

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        token_replace_emb: Tensor = None,  # type: ignore[assignment]  # upstream's default; always given
        num_tokens: int = None,  # type: ignore[assignment]  # noqa: RUF013
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, token_replace_emb, num_tokens
            )
        text_seq_length = encoder_hidden_states.shape[1]
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        x, gate, tr_gate = self.norm(x, temb, token_replace_emb, num_tokens, **_law_joined(self, x, image_rotary_emb))
        mlp, pending = begun(self.act_mlp, self.proj_mlp, x, self.rounding)
        x = _attend_joined(self.attn, x, text_seq_length, attention_mask, image_rotary_emb)
        x = joined(x, mlp, pending, self.rounding, self.proj_out)
        del mlp  # as x before it: nothing is kept for no reason while proj_out runs
        x = self.proj_out(x)

        (gate,) = _rows((tr_gate, gate))
        return _scale_residuals(hidden_states, encoder_hidden_states, x, gate, _row_index(x, num_tokens), rounding=self.rounding)


def _laws(block: Any, x: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[dict[str, Wanted], dict[str, Wanted]]:
    """By which laws the attention module of a dual-stream block takes the two streams quantised, as
    arguments of their norms.
    """
    law, text_law = law_in(block.attn, x, "to_q", "to_k", "to_v"), law_in(block.attn, text, "add_q_proj", "add_k_proj", "add_v_proj")
    if (law is None and text_law is None) or (rotary is not None and rotary[0].shape[0] != x.shape[1]):
        return {}, {}
    return law_argument(block.norm1, law), law_argument(block.norm1_context, text_law)


def _law_joined(block: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> dict[str, Wanted]:
    """By which law attention and MLP of a single-stream block take both streams in one piece, as an
    argument of its norm.
    """
    law = law_in(block.attn, x, "to_q", "to_k", "to_v")
    return {} if law is None or rotary is None else law_argument(block.norm, shared_law(law, law_for(x, block.proj_mlp)))


def _attend_joined(
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


def _scale_residuals(
    hidden_states: Tensor, encoder_hidden_states: Tensor, x: Tensor, gate: Tensor, index: Tensor | None = None, *, rounding: str
) -> tuple[Tensor, Tensor]:
    """Both residual streams + ``gate * x``, [B, S + T, D]. Upstream joins the streams, and keeps
    that copy all along.
    """
    tokens = hidden_states.shape[1]
    hidden_states, encoder_hidden_states = promoted(hidden_states, gate, rounding), promoted(encoder_hidden_states, gate, rounding)
    # In one call for the gradient of the gate to be rounded once, and where joining the streams
    # gives one of them another dtype.
    if x.requires_grad or hidden_states.dtype is not encoder_hidden_states.dtype:
        residual = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        residual = scale_residual(residual, x, gate, index=index, rounding=rounding)
        return residual[:, :tokens], residual[:, tokens:]
    first, last = (None, None) if index is None else (index[:tokens], index[tokens:])
    return (
        scale_residual(hidden_states, x[:, :tokens], gate, index=first, rounding=rounding),
        scale_residual(encoder_hidden_states, x[:, tokens:], gate, index=last, rounding=rounding),
    )


def _rows(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pairs of [B, D] -> for each the rows [B, 2, D] that an index selects from; one copy for
    all.
    """
    return torch.stack([row for pair in pairs for row in pair], dim=1).unflatten(1, (-1, 2)).unbind(1)


def _row_index(x: Tensor, num_tokens: int) -> Tensor:
    """[S]: row 0 for the first ``num_tokens`` tokens, row 1 for the rest."""
    return torch.arange(x.shape[1], device=x.device) >= num_tokens
