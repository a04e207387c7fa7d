"""HunyuanVideo (text-to-video, both image-to-video kinds, Framepack), HunyuanVideo-1.5, HunyuanImage-2.1."""

from typing import Any

import torch
from torch import Tensor

from ..functional import scale_residual
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from .adaln import AdaLayerNormZero, AdaLayerNormZeroSingle
from .base import FusedBlock


class HunyuanVideoTransformerBlock(FusedBlock):
    """diffusers' ``HunyuanVideoTransformerBlock``: ``hidden_states`` [B, S, D], ``encoder_hidden_states`` [B, T, D], ``temb`` [B, D]."""

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTransformerBlock", "HunyuanVideo15TransformerBlock"})
    fingerprints = {"forward": frozenset({"92fbf8acfc44"})}  # 0.37.0 to 0.42.1, in both
    sites = {
        "norm1": AdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
        "norm2": ScaleResidualNormScaleShift,
        "norm2_context": ScaleResidualNormScaleShift,
    }
    site_count = 4

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
        x, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        c, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb)

        x, c = self.attn(hidden_states=x, encoder_hidden_states=c, attention_mask=attention_mask, image_rotary_emb=freqs_cis)

        x, hidden_states = self.norm2(hidden_states, x, gate=gate_msa, scale=scale_mlp, shift=shift_mlp)
        c, encoder_hidden_states = self.norm2_context(encoder_hidden_states, c, gate=c_gate_msa, scale=c_scale_mlp, shift=c_shift_mlp)

        hidden_states = scale_residual(hidden_states, self.ff(x), gate_mlp, rounding=self.rounding)
        encoder_hidden_states = scale_residual(encoder_hidden_states, self.ff_context(c), c_gate_mlp, rounding=self.rounding)
        return hidden_states, encoder_hidden_states


class HunyuanImageTransformerBlock(HunyuanVideoTransformerBlock):
    """diffusers' ``HunyuanImageTransformerBlock``: HunyuanVideo's, but for the name of a parameter."""

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


class HunyuanVideoSingleTransformerBlock(FusedBlock):
    """diffusers' ``HunyuanVideoSingleTransformerBlock``: attention and MLP side by side over both streams as one."""

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoSingleTransformerBlock", "HunyuanImageSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"ec73d8a5e99f"})}  # 0.37.0 to 0.42.1, in both
    sites = {"norm": AdaLayerNormZeroSingle}
    site_count = 1

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
        text_seq_length = encoder_hidden_states.shape[1]
        residual = torch.cat([hidden_states, encoder_hidden_states], dim=1)

        x, gate = self.norm(residual, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(x))
        attn_output, context_attn_output = self.attn(
            hidden_states=x[:, :-text_seq_length],
            encoder_hidden_states=x[:, -text_seq_length:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        attn_output = torch.cat([attn_output, context_attn_output], dim=1)
        x = self.proj_out(torch.cat([attn_output, mlp], dim=2))

        hidden_states = scale_residual(residual, x, gate, rounding=self.rounding)
        return hidden_states[:, :-text_seq_length], hidden_states[:, -text_seq_length:]


class HunyuanVideoTokenReplaceAdaLayerNormZero(FusedBlock):
    """diffusers' class of this name: the first ``first_frame_num_tokens`` tokens take their modulation from ``token_replace_emb``."""

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceAdaLayerNormZero"})
    fingerprints = {"forward": frozenset({"b5abc890a2a7"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}
    block = False
    site_count = 1

    def forward(self, hidden_states: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int) -> tuple[Tensor, ...]:
        emb = self.linear(self.silu(emb))
        token_replace_emb = self.linear(self.silu(token_replace_emb))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
        tr_shift_msa, tr_scale_msa, tr_gate_msa, tr_shift_mlp, tr_scale_mlp, tr_gate_mlp = token_replace_emb.chunk(6, dim=1)

        shift, scale = _rows((tr_shift_msa, shift_msa), (tr_scale_msa, scale_msa))
        x = self.norm(hidden_states, scale=scale, shift=shift, index=_row_index(hidden_states, first_frame_num_tokens))
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp, tr_gate_msa, tr_shift_mlp, tr_scale_mlp, tr_gate_mlp


class HunyuanVideoTokenReplaceAdaLayerNormZeroSingle(FusedBlock):
    """diffusers' class of this name: the first ``first_frame_num_tokens`` tokens take their modulation from ``token_replace_emb``."""

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceAdaLayerNormZeroSingle"})
    fingerprints = {"forward": frozenset({"76d837e976ec"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}
    block = False
    site_count = 1

    def forward(
        self, hidden_states: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        emb = self.linear(self.silu(emb))
        token_replace_emb = self.linear(self.silu(token_replace_emb))
        shift_msa, scale_msa, gate_msa = emb.chunk(3, dim=1)
        tr_shift_msa, tr_scale_msa, tr_gate_msa = token_replace_emb.chunk(3, dim=1)

        shift, scale = _rows((tr_shift_msa, shift_msa), (tr_scale_msa, scale_msa))
        x = self.norm(hidden_states, scale=scale, shift=shift, index=_row_index(hidden_states, first_frame_num_tokens))
        return x, gate_msa, tr_gate_msa


class HunyuanVideoTokenReplaceTransformerBlock(FusedBlock):
    """diffusers' ``HunyuanVideoTokenReplaceTransformerBlock``: the dual-stream block with two modulations for the image stream."""

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceTransformerBlock"})
    fingerprints = {"forward": frozenset({"232efbf680df"})}  # 0.37.0 to 0.42.1
    sites = {
        "norm1": HunyuanVideoTokenReplaceAdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
        "norm2": ScaleResidualNormScaleShift,
        "norm2_context": ScaleResidualNormScaleShift,
    }
    site_count = 4

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
        x, gate_msa, shift_mlp, scale_mlp, gate_mlp, tr_gate_msa, tr_shift_mlp, tr_scale_mlp, tr_gate_mlp = self.norm1(
            hidden_states, temb, token_replace_emb, num_tokens
        )
        c, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb)

        x, c = self.attn(hidden_states=x, encoder_hidden_states=c, attention_mask=attention_mask, image_rotary_emb=freqs_cis)

        index = _row_index(hidden_states, num_tokens)
        gate1, shift, scale, gate2 = _rows(
            (tr_gate_msa, gate_msa), (tr_shift_mlp, shift_mlp), (tr_scale_mlp, scale_mlp), (tr_gate_mlp, gate_mlp)
        )
        x, hidden_states = self.norm2(hidden_states, x, gate=gate1, scale=scale, shift=shift, index=index)
        c, encoder_hidden_states = self.norm2_context(encoder_hidden_states, c, gate=c_gate_msa, scale=c_scale_mlp, shift=c_shift_mlp)

        hidden_states = scale_residual(hidden_states, self.ff(x), gate2, index=index, rounding=self.rounding)
        encoder_hidden_states = scale_residual(encoder_hidden_states, self.ff_context(c), c_gate_mlp, rounding=self.rounding)
        return hidden_states, encoder_hidden_states


class HunyuanVideoTokenReplaceSingleTransformerBlock(FusedBlock):
    """diffusers' ``HunyuanVideoTokenReplaceSingleTransformerBlock``: the single-stream block with two modulations."""

    family = "HunyuanVideo"
    names = frozenset({"HunyuanVideoTokenReplaceSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"154c1f7ef55b"})}  # 0.37.0 to 0.42.1
    sites = {"norm": HunyuanVideoTokenReplaceAdaLayerNormZeroSingle}
    site_count = 1

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
        text_seq_length = encoder_hidden_states.shape[1]
        residual = torch.cat([hidden_states, encoder_hidden_states], dim=1)

        x, gate, tr_gate = self.norm(residual, temb, token_replace_emb, num_tokens)
        mlp = self.act_mlp(self.proj_mlp(x))
        attn_output, context_attn_output = self.attn(
            hidden_states=x[:, :-text_seq_length],
            encoder_hidden_states=x[:, -text_seq_length:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        attn_output = torch.cat([attn_output, context_attn_output], dim=1)
        x = self.proj_out(torch.cat([attn_output, mlp], dim=2))

        (gate,) = _rows((tr_gate, gate))
        hidden_states = scale_residual(residual, x, gate, index=_row_index(x, num_tokens), rounding=self.rounding)
        return hidden_states[:, :-text_seq_length], hidden_states[:, -text_seq_length:]


def _rows(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Pairs of [B, D] -> for each the rows [B, 2, D] that an index selects from; one copy for all."""
    return torch.stack([row for pair in pairs for row in pair], dim=1).unflatten(1, (-1, 2)).unbind(1)


def _row_index(x: Tensor, num_tokens: int) -> Tensor:
    """[S]: row 0 for the first ``num_tokens`` tokens, row 1 for the rest."""
    return torch.arange(x.shape[1], device=x.device) >= num_tokens
