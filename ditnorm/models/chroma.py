"""Chroma: FLUX.1's blocks, whose modulations are rows of one tensor that a small network makes."""

from typing import Any

import torch
from torch import Tensor

from ..fused.activation import JoinedGELU
from ..fused.adaln import law_argument
from ..fused.block import FusedBlock, FusedUnit
from ..fused.flux import FluxAttention, Rotary, after_attention, dual_stream_laws, single_stream
from ..fused.promotion import modulated
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from ..ops.quantization import Wanted

NOTHING_TO_GAIN = {"ChromaTransformer2DModel": "a small network makes the modulations of all blocks at once"}


class ChromaAdaLayerNormZeroPruned(FusedUnit):
    """diffusers' class of this name: ``x`` [B, S, D], ``emb`` [B, 6, D]."""

    family = "FLUX.1"
    names = frozenset({"ChromaAdaLayerNormZeroPruned"})
    fingerprints = {"forward": frozenset({"ee7f524b2b15"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
        law: Wanted | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if not self.intact():
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)  # type: ignore[misc]
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.unbind(1)  # type: ignore[union-attr]  # always given
        x = modulated(self.norm, x, scale_msa, shift_msa, law=law)
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


class ChromaAdaLayerNormZeroSinglePruned(FusedUnit):
    """diffusers' class of this name: ``x`` [B, S, D], ``emb`` [B, 3, D]."""

    family = "FLUX.1"
    names = frozenset({"ChromaAdaLayerNormZeroSinglePruned"})
    fingerprints = {"forward": frozenset({"4277ae8f0792"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(self, x: Tensor, emb: Tensor | None = None, law: Wanted | None = None) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(x, emb)  # type: ignore[misc]
        shift_msa, scale_msa, gate_msa = emb.unbind(1)  # type: ignore[union-attr]  # always given
        x = modulated(self.norm, x, scale_msa, shift_msa, law=law)
        return x, gate_msa


class ChromaAdaLayerNormContinuousPruned(FusedUnit):
    """diffusers' class of this name, the output norm: ``x`` [B, S, D], ``emb`` [B, 2, D]."""

    family = "FLUX.1"
    names = frozenset({"ChromaAdaLayerNormContinuousPruned"})
    fingerprints = {"forward": frozenset({"bf2860b32abf"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not self.intact():
            return super().forward(x, emb)  # type: ignore[misc]
        shift, scale = emb.to(x.dtype).unbind(1)
        return modulated(self.norm, x, scale, shift)


class ChromaTransformerBlock(FusedBlock):
    """diffusers' ``ChromaTransformerBlock``: ``hidden_states`` [B, S, D], ``encoder_hidden_states``
    [B, T, D], ``temb`` [B, 12, D], ``attention_mask`` [B, T + S] of the tokens.
    """

    family = "FLUX.1"
    names = frozenset({"ChromaTransformerBlock"})
    fingerprints = {"forward": frozenset({"ffeada873d08"})}  # 0.37.0 to 0.42.1
    sites = {
        "norm1": ChromaAdaLayerNormZeroPruned,
        "norm1_context": ChromaAdaLayerNormZeroPruned,
        "norm2": ScaleResidualNormScaleShift,
        "norm2_context": ScaleResidualNormScaleShift,
        "attn": FluxAttention,
    }
    residuals = 2

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_mask, joint_attention_kwargs
            )
        kwargs = joint_attention_kwargs or {}
        law, c_law = dual_stream_laws(self.attn, hidden_states, encoder_hidden_states, image_rotary_emb, kwargs)
        x, *modulation = self.norm1(hidden_states, emb=temb[:, :6], **law_argument(self.norm1, law))
        c, *c_modulation = self.norm1_context(encoder_hidden_states, emb=temb[:, 6:], **law_argument(self.norm1_context, c_law))

        mask = _pairs(attention_mask)
        outputs = [*self.attn(hidden_states=x, encoder_hidden_states=c, image_rotary_emb=image_rotary_emb, attention_mask=mask, **kwargs)]
        del x, c  # memory peaks in the MLP
        return after_attention(self, hidden_states, encoder_hidden_states, outputs, modulation, c_modulation)


class ChromaSingleTransformerBlock(JoinedGELU, FusedBlock):
    """diffusers' ``ChromaSingleTransformerBlock``: ``hidden_states`` [B, T + S, D], ``temb`` [B, 3,
    D].
    """

    family = "FLUX.1"
    names = frozenset({"ChromaSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"3ca366a0f844"})}  # 0.37.0 to 0.42.1
    sites = {"norm": ChromaAdaLayerNormZeroSinglePruned, "attn": FluxAttention}
    residuals = 1

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        if not self.intact():
            return super().forward(hidden_states, temb, image_rotary_emb, attention_mask, joint_attention_kwargs)  # type: ignore[misc]
        mask = _pairs(attention_mask)
        return single_stream(self, hidden_states, temb, image_rotary_emb, joint_attention_kwargs or {}, attention_mask=mask)


def _pairs(mask: Tensor | None) -> Tensor | None:
    """[B, N] of the tokens -> [B, 1, N, N] of their pairs."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]
