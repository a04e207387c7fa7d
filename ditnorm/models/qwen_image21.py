"""Qwen-Image 2.1, text-to-image and Edit: one stream of text and pictures, one modulation for all
blocks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..functional import qk_norm_rope, scale_residual
from ..fused.activation import describe_silu_module, gated_linears, is_torchs_silu
from ..fused.activation_sites import Activation
from ..fused.attention import FusedAttention
from ..fused.block import FusedBlock, FusedUnit
from ..fused.feed_forward import FeedForwardBody, law_in_feed_forward
from ..fused.laws import hooked, law_for, quantized_for
from ..fused.norms import weight_of
from ..fused.promotion import modulated, no_shift, promoted
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from ..ops.quantization import Wanted

_SELECTS_ROWS = {"_select_modulation_rows": frozenset({"8dced6670ad1"})}  # 0.41.0 to 0.42.1


NOTHING_TO_GAIN = {"QwenImage21Transformer2DModel": "one modulation serves all blocks"}


class _Projected:
    """The attention module as its processor sees it once its projections are computed; by default,
    query and key are also normed.
    """

    def __init__(self, attention: Any, query: Tensor, key: Tensor, value: Tensor, *norms: Any) -> None:
        self.heads, self.inner_dim, self.to_out = attention.heads, attention.inner_dim, attention.to_out
        self.norm_q, self.norm_k = norms or (_unchanged, _unchanged)
        self._projections = query, key, value

    def to_q(self, hidden_states: Tensor) -> Tensor:
        return self._projections[0]

    def to_k(self, hidden_states: Tensor) -> Tensor:
        return self._projections[1]

    def to_v(self, hidden_states: Tensor) -> Tensor:
        return self._projections[2]


def _unchanged(normed: Tensor) -> Tensor:
    return normed


class QwenImage21Attention(FusedAttention):
    """diffusers' ``QwenImage21Attention`` with either of its processors, which find query and key
    prepared and do all the rest.
    """

    fingerprints = {"forward": frozenset({"3d142c56e8fb"})}  # 0.41.0 to 0.42.1, as the next
    processors = {"QwenImage21AttnProcessor": {"e1f4ac0b10ba": None}, "QwenImage21FlexAttnProcessor": {"e1935639de02": None}}
    helpers = {
        "_qwenimage21_prepare_qkv": frozenset({"3489071219d6", "d3d25a535655"}),
        "apply_rotary_emb_qwen": frozenset({"4da6116279ad"}),
    }
    norm = "diffusers_rms"
    rotary = "complex"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        rotary_emb = kwargs.get("rotary_emb")
        aligned = rotary_emb is None or rotary_emb.shape[0] == hidden_states.shape[1]
        if self.fuses() is None or not self.fits("qk_norm_rope", aligned):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc]
        shared = quantized_for(hidden_states, self.to_q, self.to_k, self.to_v)
        query, key, value = self.to_q(shared), self.to_k(shared), self.to_v(shared)
        weights = weight_of(self.norm_q), weight_of(self.norm_k)
        # Upstream rounds a norm in another dtype before it rotates, which the op doesn't do.
        one_dtype = len({t.dtype for t in (query, key, value, *weights) if t is not None}) == 1
        if not self.fits("qk_norm_rope", one_dtype or self.rounding == "single"):
            return self.processor(_Projected(self, query, key, value, self.norm_q, self.norm_k), hidden_states, **kwargs)
        query, key = qk_norm_rope(
            query,
            key,
            *weights,
            rotary_emb,
            head_dim=self.inner_dim // self.heads,
            norm="diffusers_rms",
            eps=self.eps(),
            rounding=self.rounding,
        )
        projected = _Projected(self, query.flatten(2), key.flatten(2), value)
        return self.processor(projected, hidden_states, **kwargs | {"rotary_emb": None})


class QwenImage21SwiGLUFeedForward(FeedForwardBody):
    """diffusers' class of this name: [..., D] -> [..., D]."""

    fingerprints = {"forward": frozenset({"02e4ff668855"})}  # 0.41.0 to 0.42.1
    optional = True
    reported_as = "activation"

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        yield describe_silu_module("activation_fn", module.activation_fn)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.intact() or not is_torchs_silu(self.activation_fn):
            return super().forward(hidden_states)  # type: ignore[misc]
        shared = quantized_for(hidden_states, self.gate_layer, self.proj)
        return self.out(gated_linears(self.activation_fn, self.gate_layer, self.proj, shared, self.rounding, self.out))

    def law(self, x: Tensor) -> Wanted | None:
        if hooked(self) or not self.intact() or not is_torchs_silu(self.activation_fn):
            return None
        return law_for(x, self.gate_layer, self.proj)


def _rows(modulation: Tensor, target_token_mask: Tensor | None) -> Tensor:
    """With a mask [B + 1, N] -> [B, 2, N]: the rows that the mask selects from, that of timestep 0
    (the last one) and the sample's own.
    """
    if target_token_mask is None:
        return modulation
    return torch.stack([modulation[-1:].expand_as(modulation[:-1]), modulation[:-1]], dim=1)


class QwenImage21TransformerBlock(FusedBlock):
    """diffusers' ``QwenImage21TransformerBlock``: ``hidden_states`` [B, S, D]; ``modulation`` [B, 4
    * D].

    With ``target_token_mask`` [S] ``modulation`` is [B + 1, 4 * D], and tokens where it is False
    take the last row.
    """

    family = "Qwen-Image"
    names = frozenset({"QwenImage21TransformerBlock"})
    fingerprints = {"forward": frozenset({"5da14fbe1fdd"}), "_modulate": frozenset({"f369c76c2619"})}  # 0.41.0 to 0.42.1
    functions = _SELECTS_ROWS
    sites = {
        "img_norm1": LayerNormScaleShift,
        "img_norm2": ScaleResidualNormScaleShift,
        "attn": QwenImage21Attention,
        "img_mlp": QwenImage21SwiGLUFeedForward,
    }
    residuals = 1

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        rotary_emb: Tensor | None = None,
        attention_mask: Any | None = None,
        target_token_mask: Tensor | None = None,
        layer_cache: Any | None = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states,
                modulation,
                rotary_emb,
                attention_mask,
                target_token_mask,
                layer_cache,
                kv_cache_mode,
                cache_write_slice,
                segments,
                key_valid,
            )
        scale1, gate1, scale2, gate2 = _rows(modulation, target_token_mask).chunk(4, dim=-1)
        gate1, gate2, shift = gate1.tanh(), gate2.tanh(), no_shift(scale1)

        x = self.attn(
            hidden_states=modulated(self.img_norm1, hidden_states, scale1, shift, target_token_mask),
            attention_mask=attention_mask,
            rotary_emb=rotary_emb,
            layer_cache=layer_cache,
            kv_cache_mode=kv_cache_mode,
            cache_write_slice=cache_write_slice,
            segments=segments,
            key_valid=key_valid,
        )
        hidden_states = promoted(hidden_states, gate1, self.rounding)
        law = law_in_feed_forward(self.img_mlp, hidden_states)
        x, hidden_states = self.img_norm2(hidden_states, x, gate=gate1, scale=scale2, shift=shift, index=target_token_mask, law=law)
        hidden_states = scale_residual(hidden_states, self.img_mlp(x), gate2, index=target_token_mask, rounding=self.rounding)
        return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states


class QwenImage21AdaLayerNormContinuous(FusedUnit):
    """diffusers' ``QwenImage21AdaLayerNormContinuous``, the output norm: ``conditioning_embedding``
    [B, D], with a mask [B + 1, D].
    """

    family = "Qwen-Image"
    names = frozenset({"QwenImage21AdaLayerNormContinuous"})
    fingerprints = {"forward": frozenset({"264465afb9c3"})}  # 0.41.0 to 0.42.1
    functions = _SELECTS_ROWS
    sites = {"norm": LayerNormScaleShift}

    def forward(self, hidden_states: Tensor, conditioning_embedding: Tensor, target_token_mask: Tensor | None = None) -> Tensor:
        if not self.intact():
            return super().forward(hidden_states, conditioning_embedding, target_token_mask)  # type: ignore[misc]
        scale = _rows(self.linear(self.silu(conditioning_embedding).to(hidden_states.dtype)), target_token_mask)
        return modulated(self.norm, hidden_states, scale, no_shift(scale), target_token_mask)
