"""Ovis-Image: FLUX.1's blocks, but for the SwiGLU of its single-stream blocks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..fused.activation import describe_silu_module, is_torchs_silu, silu_gated
from ..fused.activation_sites import Activation
from ..fused.adaln import AdaLayerNormZeroSingle
from ..fused.block import FusedBlock
from ..fused.flux import FluxAttention, Rotary, one_sequence, scale_residual_clipped, single_stream_law


class OvisImageSingleTransformerBlock(FusedBlock):
    """diffusers' ``OvisImageSingleTransformerBlock``: attention and MLP side by side over both
    streams as one, the text first.
    """

    family = "FLUX.1"
    names = frozenset({"OvisImageSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"fd0c37f9111b"})}  # 0.37.0 to 0.42.1
    sites = {"norm": AdaLayerNormZeroSingle, "attn": FluxAttention}
    residuals = 1

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        yield describe_silu_module("act_mlp", module.act_mlp)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)  # type: ignore[misc]
        kwargs = joint_attention_kwargs or {}
        text = encoder_hidden_states.shape[1]
        residual = one_sequence(self, encoder_hidden_states, hidden_states)
        x, gate = self.norm(residual, emb=temb, **single_stream_law(self, residual, image_rotary_emb, kwargs))
        mlp, mlp_gate = self.proj_mlp(x).split([self.mlp_hidden_dim, self.mlp_hidden_dim], dim=-1)
        pending = is_torchs_silu(self.act_mlp)
        if not pending:
            mlp = self.act_mlp(mlp_gate) * mlp
        x = self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **kwargs)
        x = silu_gated(mlp_gate, mlp, x, rounding=self.rounding, reader=self.proj_out) if pending else torch.cat([x, mlp], dim=-1)
        del mlp, mlp_gate  # like the earlier x they needn't be alive while proj_out runs
        x = scale_residual_clipped(residual, self.proj_out(x), gate, self.rounding)
        return x[:, :text], x[:, text:]
