"""The blocks of image-to-video by token replacement: the tokens of the first frame, which is given,
have a modulation of their own.
"""

import torch
from torch import Tensor

from ...functional import scale_residual
from ...fused.activation import join_mlp, start_mlp
from ...fused.adaln import AdaLayerNormZero
from ...fused.block import FusedBlock, FusedUnit
from ...fused.feed_forward import law_in_feed_forward
from ...fused.modulation import Modulating
from ...fused.promotion import modulated, promoted
from ...layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from ...ops.quantization import Wanted
from .attention import HunyuanVideoAttention, attend_joined, dual_stream_laws, single_stream_law
from .blocks import SingleStream, scale_residuals


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
        given, c_given = dual_stream_laws(self, hidden_states, encoder_hidden_states, freqs_cis)
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


class HunyuanVideoTokenReplaceSingleTransformerBlock(SingleStream, FusedBlock):
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
        x, gate, tr_gate = self.norm(x, temb, token_replace_emb, num_tokens, **single_stream_law(self, x, image_rotary_emb))
        mlp, pending = start_mlp(self.act_mlp, self.proj_mlp, x, self.rounding)
        x = attend_joined(self.attn, x, text_seq_length, attention_mask, image_rotary_emb)
        x = join_mlp(x, mlp, pending, self.rounding, self.proj_out)
        del mlp  # like the earlier x it needn't be alive while proj_out runs
        x = self.proj_out(x)

        (gate,) = _rows((tr_gate, gate))
        return scale_residuals(hidden_states, encoder_hidden_states, x, gate, _row_index(x, num_tokens), rounding=self.rounding)


def _rows(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pairs of [B, D] -> for each the rows [B, 2, D] that an index selects from; one copy for
    all.
    """
    return torch.stack([row for pair in pairs for row in pair], dim=1).unflatten(1, (-1, 2)).unbind(1)


def _row_index(x: Tensor, num_tokens: int) -> Tensor:
    """[S]: row 0 for the first ``num_tokens`` tokens, row 1 for the rest."""
    return torch.arange(x.shape[1], device=x.device) >= num_tokens
