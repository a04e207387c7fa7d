"""The block of both streams, and as diffusers 0.37 has it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import norm_scale_shift, scale_residual
from ...fused.block import FusedBlock
from ...fused.module import FusedModule
from ...fused.norms import DiffusersRMSNormScaleShift, ScaleResidualDiffusersRMSNormScaleShift, norm_call, shape_of, weight_of
from ...fused.promotion import modulate, modulated, promoted
from ...fused.sites import FusedCall, Site
from ...swapping.swapped import untouched
from .attention import LTX2Attention, Rotary

Modulation = Tensor | None


class LTX2VideoTransformerBlock(FusedBlock):
    """diffusers' ``LTX2VideoTransformerBlock``: ``hidden_states`` [B, S, D],
    ``audio_hidden_states`` [B, A, E], their modulations [B, 1 or the tokens, n * D or n * E].
    """

    family = "LTX-2"
    names = frozenset({"LTX2VideoTransformerBlock"})
    fingerprints = {
        "forward": frozenset({"48dc347088e1", "3a0fdb44e118"}),  # 0.38.0 and 0.39.0; 0.40.0 to 0.42.1
        "get_mod_params": frozenset({"4a78221fa0f3"}),  # 0.38.0 to 0.42.1
    }
    sites = {
        **dict.fromkeys(("norm1", "audio_norm1"), DiffusersRMSNormScaleShift),
        **dict.fromkeys(
            ("norm2", "audio_norm2", "audio_to_video_norm", "video_to_audio_norm", "norm3", "audio_norm3"),
            ScaleResidualDiffusersRMSNormScaleShift,
        ),
        **dict.fromkeys(
            ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
            LTX2Attention,
        ),
    }

    @classmethod
    def calls(cls, module: nn.Module, dtype: torch.dtype) -> Iterator[FusedCall]:
        """Calls of two widths. Two of the norms stand in two calls each."""
        for part in cls.parts(module):
            if part.body is None or issubclass(part.body, FusedModule):
                continue
            (width,) = shape_of(part.module) or (0,)
            yield norm_call(part.body, part.module, width, dtype, None, True)
            if part.path in ("audio_to_video_norm", "video_to_audio_norm"):
                yield norm_call(DiffusersRMSNormScaleShift, part.module, width, dtype, None, True)
            if part.path in ("norm3", "audio_norm3"):
                yield Site("scale_residual", width, dtype)

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: Rotary | None = None,
        audio_rotary_emb: Rotary | None = None,
        ca_video_rotary_emb: Rotary | None = None,
        ca_audio_rotary_emb: Rotary | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.intact() or use_a2v_cross_attention != use_v2a_cross_attention:
            return super().forward(  # type: ignore[misc]
                hidden_states,
                audio_hidden_states,
                encoder_hidden_states,
                audio_encoder_hidden_states,
                temb,
                temb_audio,
                temb_ca_scale_shift,
                temb_ca_audio_scale_shift,
                temb_ca_gate,
                temb_ca_audio_gate,
                temb_prompt,
                temb_prompt_audio,
                video_rotary_emb,
                audio_rotary_emb,
                ca_video_rotary_emb,
                ca_audio_rotary_emb,
                encoder_attention_mask,
                audio_encoder_attention_mask,
                self_attention_mask,
                audio_self_attention_mask,
                a2v_cross_attention_mask,
                v2a_cross_attention_mask,
                use_a2v_cross_attention,
                use_v2a_cross_attention,
                perturbation_mask,
                all_perturbed,
            )
        perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if self.perturbed_attn else {}
        (shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp), of_text = _modulations(self.scale_shift_table, temb)
        (a_shift_msa, a_scale_msa, a_gate_msa, a_shift_mlp, a_scale_mlp, a_gate_mlp), of_a_text = _modulations(
            self.audio_scale_shift_table, temb_audio
        )

        x = modulated(self.norm1, hidden_states, scale_msa, shift_msa)
        x = self.attn1(
            hidden_states=x,
            encoder_hidden_states=None,
            query_rotary_emb=video_rotary_emb,
            attention_mask=self_attention_mask,
            **perturbed,
        )
        a = modulated(self.audio_norm1, audio_hidden_states, a_scale_msa, a_shift_msa)
        a = self.audio_attn1(
            hidden_states=a,
            encoder_hidden_states=None,
            query_rotary_emb=audio_rotary_emb,
            attention_mask=audio_self_attention_mask,
            **perturbed,
        )

        shift_text, scale_text, gate_text = of_text
        x, hidden_states = _add_and_norm(self.norm2, hidden_states, x, gate_msa, scale_text, shift_text)
        if self.cross_attn_adaln:
            encoder_hidden_states = _prompt(encoder_hidden_states, hidden_states, self.prompt_scale_shift_table, temb_prompt)
        x = self.attn2(x, encoder_hidden_states=encoder_hidden_states, query_rotary_emb=None, attention_mask=encoder_attention_mask)
        a_shift_text, a_scale_text, a_gate_text = of_a_text
        a, audio_hidden_states = _add_and_norm(self.audio_norm2, audio_hidden_states, a, a_gate_msa, a_scale_text, a_shift_text)
        if self.cross_attn_adaln:
            table = self.audio_prompt_scale_shift_table
            audio_encoder_hidden_states = _prompt(audio_encoder_hidden_states, audio_hidden_states, table, temb_prompt_audio)
        a = self.audio_attn2(
            a,
            encoder_hidden_states=audio_encoder_hidden_states,
            query_rotary_emb=None,
            attention_mask=audio_encoder_attention_mask,
        )

        if use_a2v_cross_attention:
            table, a_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
            rows, a_rows = self.rows(table[:4], temb_ca_scale_shift), self.rows(a_table[:4], temb_ca_audio_scale_shift)
            x, x_v2a, hidden_states = _add_and_norm_twice(self.audio_to_video_norm, hidden_states, x, gate_text, *rows)
            a, a_v2a, audio_hidden_states = _add_and_norm_twice(self.video_to_audio_norm, audio_hidden_states, a, a_gate_text, *a_rows)
            x = self.audio_to_video_attn(
                x,
                encoder_hidden_states=a,
                query_rotary_emb=ca_video_rotary_emb,
                key_rotary_emb=ca_audio_rotary_emb,
                attention_mask=a2v_cross_attention_mask,
            )
            a = self.video_to_audio_attn(
                a_v2a,
                encoder_hidden_states=x_v2a,
                query_rotary_emb=ca_audio_rotary_emb,
                key_rotary_emb=ca_video_rotary_emb,
                attention_mask=v2a_cross_attention_mask,
            )
            del x_v2a, a_v2a
            (gate_text,), (a_gate_text,) = self.rows(table[4:], temb_ca_gate), self.rows(a_table[4:], temb_ca_audio_gate)

        x, hidden_states = _add_and_norm(self.norm3, hidden_states, x, gate_text, scale_mlp, shift_mlp)
        hidden_states = scale_residual(promoted(hidden_states, gate_mlp, self.rounding), self.ff(x), gate_mlp, rounding=self.rounding)
        a, audio_hidden_states = _add_and_norm(self.audio_norm3, audio_hidden_states, a, a_gate_text, a_scale_mlp, a_shift_mlp)
        audio_hidden_states = promoted(audio_hidden_states, a_gate_mlp, self.rounding)
        return hidden_states, scale_residual(audio_hidden_states, self.audio_ff(a), a_gate_mlp, rounding=self.rounding)

    @staticmethod
    def rows(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        """The modulations of a cross-attention, as :func:`_rows` makes them."""
        return _rows(table, temb)


class LTX2VideoTransformerBlockOf037(LTX2VideoTransformerBlock):
    """The block of diffusers 0.37, which has LTX-2 but not 2.3: prompts aren't modulated, and
    nothing is perturbed.
    """

    fingerprints = {"forward": frozenset({"d2fe41ad91c1"})}  # 0.37.0 and 0.37.1
    cross_attn_adaln = perturbed_attn = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        video_rotary_emb: Rotary | None = None,
        audio_rotary_emb: Rotary | None = None,
        ca_video_rotary_emb: Rotary | None = None,
        ca_audio_rotary_emb: Rotary | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        streams = (hidden_states, audio_hidden_states, encoder_hidden_states, audio_encoder_hidden_states)
        modulations = (temb, temb_audio, temb_ca_scale_shift, temb_ca_audio_scale_shift, temb_ca_gate, temb_ca_audio_gate)
        rotary = (video_rotary_emb, audio_rotary_emb, ca_video_rotary_emb, ca_audio_rotary_emb)
        masks = (encoder_attention_mask, audio_encoder_attention_mask)
        cross_masks = (a2v_cross_attention_mask, v2a_cross_attention_mask)
        if not self.intact():
            return super(LTX2VideoTransformerBlock, self).forward(*streams, *modulations, *rotary, *masks, *cross_masks)  # type: ignore[misc]
        more: tuple[Any, ...] = (None, None, *rotary, *masks, None, None, *cross_masks)
        return super().forward(*streams, *modulations, *more)

    @staticmethod
    def rows(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        """The modulations of a cross-attention, whose tables this release casts first."""
        return _rows(table.to(temb.dtype), temb)


def _rows(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """The modulations that a table [n, D] makes of ``temb`` [B, 1 or S, n * D]: [B, 1 or S, D]
    each. Their sum is rounded, so that no kernel can add them on the way.
    """
    batch, tokens, _ = temb.shape
    return (table[None, None].to(temb.device) + temb.reshape(batch, tokens, table.shape[0], -1)).unbind(dim=2)


def _modulations(table: Tensor, temb: Tensor) -> tuple[tuple[Tensor, ...], tuple[Modulation, ...]]:
    """Those of a stream's own attention and feed-forward, and those of its attention to the text
    where it has such.
    """
    rows = _rows(table, temb)
    return rows[:6], rows[6:] or (None, None, None)


def _prompt(text: Tensor, x: Tensor, table: Tensor, temb: Tensor | None) -> Tensor:
    """The text modulated for a stream ``x``, whatever the timestep where there is no ``temb``."""
    shift, scale = table[None, None].to(x.device, x.dtype).unbind(dim=2) if temb is None else _rows(table, temb)
    return text * (1 + scale) + shift


def _add_and_norm(norm: Any, residual: Tensor, x: Tensor, gate: Modulation, scale: Modulation, shift: Modulation) -> tuple[Tensor, Tensor]:
    """``(y, r)``: ``r = residual + gate * x``, ``y = norm(r) * (1 + scale) + shift``."""
    if gate is not None:
        residual = promoted(residual, gate, norm.rounding)
    if scale is None or scale.dtype is residual.dtype or norm.rounding == "single":
        return norm(residual, x, gate=gate, scale=scale, shift=shift)
    r = scale_residual(residual, x, gate, rounding=norm.rounding)
    return modulate(norm(r), scale, shift), r  # type: ignore[arg-type]


def _add_and_norm_twice(
    norm: Any, residual: Tensor, x: Tensor, gate: Modulation, scale: Tensor, shift: Tensor, scale2: Tensor, shift2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, y2, r)``: as :func:`_add_and_norm`, the norm modulated in two ways.

    It is computed twice: for 768x512x121 that reads 50 MB more in a block, 0.2 % of its time.
    """
    if untouched(norm) and scale2.dtype is residual.dtype and not (torch.is_grad_enabled() and norm.rounding == "eager"):
        y, r = _add_and_norm(norm, residual, x, gate, scale, shift)
        affine = {"weight": weight_of(norm), "bias": norm.bias}
        return y, norm_scale_shift(r, scale2, shift2, **affine, norm=norm.norm, eps=norm.eps, rounding=norm.rounding), r
    # One call, as upstream: somebody watches it, or gradients are to be summed before they go
    # through it.
    n, r = _add_and_norm(norm, residual, x, gate, None, None)
    return modulate(n, scale, shift), modulate(n, scale2, shift2), r
