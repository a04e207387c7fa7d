"""The blocks with one modulation for all tokens."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...functional import scale_residual
from ...fused.activation import JoinedGELU, join_mlp, start_mlp
from ...fused.adaln import AdaLayerNormZero, AdaLayerNormZeroSingle
from ...fused.block import FusedBlock
from ...fused.feed_forward import law_in_feed_forward
from ...fused.promotion import promoted
from ...layers import ScaleResidualNormScaleShift
from ...swapping.swapped import untouched
from .attention import HunyuanVideoAttention, attend_joined, dual_stream_laws, single_stream_law


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
        given, c_given = dual_stream_laws(self, hidden_states, encoder_hidden_states, freqs_cis)
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
        return super().forward(hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, *args, **kwargs)


class SingleStream(JoinedGELU):
    """A single-stream block. Its residual is the two streams themselves; upstream's is the joined
    copy that its norm was given.
    """

    _modules: dict[str, Any]
    sites: ClassVar[Mapping[str, type]]

    def intact(self) -> bool:
        """As of :class:`FusedModule`. Besides, nobody else is given the joined copy, and could
        write to it.
        """
        norm: Any = self._modules.get("norm")
        known = super().intact() and isinstance(norm, self.sites["norm"])  # type: ignore[misc]
        return known and norm.intact() and untouched(norm, norm.norm)


class HunyuanVideoSingleTransformerBlock(SingleStream, FusedBlock):
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
        x, gate = self.norm(x, emb=temb, **single_stream_law(self, x, image_rotary_emb))
        mlp, pending = start_mlp(self.act_mlp, self.proj_mlp, x, self.rounding)
        x = attend_joined(self.attn, x, text_seq_length, attention_mask, image_rotary_emb)
        x = join_mlp(x, mlp, pending, self.rounding, self.proj_out)
        del mlp  # like the earlier x it needn't be alive while proj_out runs
        x = self.proj_out(x)

        return scale_residuals(hidden_states, encoder_hidden_states, x, gate, rounding=self.rounding)


def scale_residuals(
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
