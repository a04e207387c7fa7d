"""Lumina-Image 2.0."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..functional import qk_norm_rope
from ..fused.activation import describe_silu_function, gated_linears
from ..fused.activation_sites import Activation
from ..fused.attention import FusedAttention
from ..fused.block import FusedUnit
from ..fused.gelu import called_otherwise
from ..fused.laws import quantized_for
from ..fused.module import FusedModule, upstream_of
from ..fused.norms import DiffusersRMSNormScaleShift, ScaleResidualDiffusersRMSNormScaleShift, weight_of
from ..fused.promotion import modulated, no_shift
from ..fused.sandwich import SandwichBlock
from ..layers import LayerNormScaleShift
from ..swapping.fingerprint import fingerprint
from ..swapping.originals import full_name
from ..swapping.swapped import untouched

NOTHING_TO_GAIN = {
    "Lumina2Transformer2DModel": "its modulations are made by a tenth of its weights, from what one module returns together with the text"
}


class Lumina2Attention(FusedAttention):
    """diffusers' ``Attention`` with Lumina 2's processor: fewer heads of key and value. Its rotary
    tables are complex128, which no kernel takes: upstream's function rotates.
    """

    fingerprints = {"forward": frozenset({"f24e3a146064"})}  # 0.37.0 to 0.42.1, as the next
    processors = {"diffusers.models.transformers.transformer_lumina2:Lumina2AttnProcessor2_0": {"915f73e925ec": None}}
    helpers = {}
    norm = "diffusers_rms"
    rotary = None
    upstreams = {"rotary embedding": "its tables are complex128, and upstream multiplies in float64"}

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        kwargs = dict(cross_attention_kwargs)
        rotary, base = kwargs.pop("image_rotary_emb", None), kwargs.pop("base_sequence_length", None)
        if kwargs or encoder_hidden_states is not hidden_states or self.fuses() is None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)  # type: ignore[misc]
        batch, tokens = hidden_states.shape[:2]
        shared = quantized_for(hidden_states, self.to_q, self.to_k, self.to_v)
        query, key, value = self.to_q(shared), self.to_k(shared), self.to_v(shared)
        head_dim, dtype = query.shape[-1] // self.heads, query.dtype
        value = value.unflatten(-1, (-1, head_dim))
        query, key = qk_norm_rope(
            query,
            key,
            weight_of(self.norm_q),
            weight_of(self.norm_k),
            None,
            head_dim=head_dim,
            norm="diffusers_rms",
            eps=self.eps(),
            rounding=self.rounding,
        )
        if rotary is not None:
            rotate = self.upstream("apply_rotary_emb")
            query, key = rotate(query, rotary, use_real=False), rotate(key, rotary, use_real=False)
        query, key = query.to(dtype), key.to(dtype)

        scale = self.scale if base is None else math.sqrt(math.log(tokens, base)) * self.scale
        repeats = self.heads // key.shape[2]
        key, value = (t.unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3) for t in (key, value))
        if attention_mask is not None:
            attention_mask = attention_mask.bool().view(batch, 1, 1, -1)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scale)
        attended = attended.transpose(1, 2).reshape(batch, -1, self.heads * head_dim).type_as(query)
        return self.project(attended)


class LuminaFeedForward(FusedModule):
    """diffusers' class of this name: [..., D] -> [..., D]. Its SiLU computes in float32 and rounds,
    as PyTorch's does.
    """

    fingerprints = {"forward": frozenset({"e5b4885bc85f"})}  # 0.37.0 to 0.42.1, as the next
    optional = True
    reported_as = "activation"

    silu_forward: ClassVar[Any] = None
    """That of ``FP32SiLU``, where it is known."""

    @classmethod
    def _look(cls) -> bool:
        cls.silu_forward = staticmethod(_known_silu(cls.origin))
        return super()._look()

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        silu, reason = module.silu, None
        known = _known_silu(upstream_of(type(module)))
        if type(silu).forward is not known:
            reason = f"{full_name(type(silu))} is not the SiLU that ditnorm knows here"
        elif not _is_silu(silu, known):
            reason = called_otherwise(silu)
        yield describe_silu_function("silu", reason)

    def forward(self, x: Tensor) -> Tensor:
        silu = self._modules["silu"]
        if not _is_silu(silu, self.silu_forward) or not self.intact():
            return super().forward(x)  # type: ignore[misc]
        shared = quantized_for(x, self.linear_1, self.linear_3)
        return self.linear_2(gated_linears(silu, self.linear_1, self.linear_3, shared, self.rounding, self.linear_2))


def _known_silu(origin: Any) -> Any:
    """The forward of the ``FP32SiLU`` that upstream's feed-forward makes, where it is known."""
    forward = getattr(origin.forward.__globals__.get("FP32SiLU"), "forward", None)
    return forward if fingerprint(forward) == "675043cfa7a3" else None  # 0.37.0 to 0.42.1


def _is_silu(silu: Any, forward: Any) -> bool:
    """Whether a call of ``silu`` is one of ``forward``, and nobody looks at it."""
    return type(silu).forward is forward and "forward" not in silu.__dict__ and untouched(silu)


class LuminaRMSNormZero(FusedUnit):
    """diffusers' class of this name: ``x`` [B, S, D], ``emb`` [B, N]; the modulations returned
    beside the modulated ``x`` are views [B, D].
    """

    family = "Lumina2"
    names = frozenset({"LuminaRMSNormZero"})
    fingerprints = {"forward": frozenset({"735e5cd7e91c"})}  # 0.37.0 to 0.42.1
    sites = {"norm": DiffusersRMSNormScaleShift}

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not self.intact():
            return super().forward(x, emb)  # type: ignore[misc]
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(4, dim=1)
        return self.norm(x, scale=scale_msa[:, None]), gate_msa, scale_mlp, gate_mlp


class Lumina2TransformerBlock(SandwichBlock):
    """diffusers' class of this name: ``hidden_states`` [B, S, D], ``temb`` [B, N]. Its first norm
    is upstream's where nothing modulates it, in the blocks that see the text alone.
    """

    family = "Lumina2"
    names = frozenset({"Lumina2TransformerBlock"})
    fingerprints = {"forward": frozenset({"9197eb74293c"})}  # 0.37.0 to 0.42.1
    sites = {
        "norm2": DiffusersRMSNormScaleShift,
        "ffn_norm1": ScaleResidualDiffusersRMSNormScaleShift,
        "ffn_norm2": DiffusersRMSNormScaleShift,
        "attn": Lumina2Attention,
        "feed_forward": LuminaFeedForward,
    }
    anywhere = (*SandwichBlock.anywhere, LuminaRMSNormZero)
    branches = {"norm2": "ffn_norm1", "ffn_norm2": None}

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Tensor, temb: Tensor | None = None) -> Tensor:
        if not self.intact():
            return super().forward(hidden_states, attention_mask, image_rotary_emb, temb)  # type: ignore[misc]
        gate_msa = scale_mlp = gate_mlp = None
        if self.modulation:
            x, gate_msa, scale_mlp, gate_mlp = self.norm1(hidden_states, temb)
            gate_msa, gate_mlp, scale_mlp = gate_msa.unsqueeze(1).tanh(), gate_mlp.unsqueeze(1).tanh(), scale_mlp.unsqueeze(1)
        else:
            x = self.norm1(hidden_states)
        x = self.attn(hidden_states=x, encoder_hidden_states=x, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
        x, hidden_states = self.add_and_norm("norm2", hidden_states, x, gate_msa, scale_mlp)
        return self.add("ffn_norm2", hidden_states, self.feed_forward(x), gate_mlp)


class LuminaLayerNormContinuous(FusedUnit):
    """diffusers' class of this name, the output norm: ``conditioning_embedding`` [B, N]."""

    family = "Lumina2"
    names = frozenset({"LuminaLayerNormContinuous"})
    fingerprints = {"forward": frozenset({"e0861d624872"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        if not self.intact():
            return super().forward(x, conditioning_embedding)  # type: ignore[misc]
        scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))[:, None]
        x = modulated(self.norm, x, scale, no_shift(scale))
        return x if self.linear_2 is None else self.linear_2(x)
