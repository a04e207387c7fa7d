"""Stable Diffusion 3 and 3.5 (Medium with its second attention, Large), and their ControlNets."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import joint_qk_norm_rope, qk_norm_rope, scale_residual
from ..fused.adaln import AdaLayerNormContinuous, AdaLayerNormZero, law_argument
from ..fused.attention import FusedAttention, law_in
from ..fused.block import FusedBlock, FusedUnit
from ..fused.feed_forward import law_in_feed_forward
from ..fused.laws import quantized_for, shared_law
from ..fused.modulation import ModulatedModel, Modulating
from ..fused.norms import weight_of
from ..fused.promotion import modulate, modulated, promoted
from ..fused.sites import FusedCall, Site
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from ..ops.layout import laid_out_as
from ..ops.quantization import Wanted
from ..swapping.swapped import untouched

MODULATED = (
    ModulatedModel(
        names=frozenset({"SD3Transformer2DModel"}),
        forward=frozenset({"c8018630ce92", "51cbfc568b83"}),  # 0.37.0 to 0.39.0; 0.40.0 to 0.42.1
        embedding="time_text_embed",
        takers=("transformer_blocks", "norm_out"),
    ),
    ModulatedModel(
        names=frozenset({"SD3ControlNetModel"}),
        forward=frozenset({"123793aae4d0"}),  # 0.37.0 to 0.42.1
        embedding="time_text_embed",
        takers=("transformer_blocks",),
    ),
)


class SD3Attention(FusedAttention):
    """diffusers' ``Attention`` with ``JointAttnProcessor2_0``: joint attention, the text's tokens
    last, or attention of the image alone where no text is given.
    """

    fingerprints = {"forward": frozenset({"f24e3a146064"})}  # 0.37.0 to 0.42.1, as the next
    processors = {"diffusers.models.attention_processor:JointAttnProcessor2_0": {"90ad0b2ec199": None}}
    helpers = {}
    norm = "diffusers_rms"
    rotary = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if cross_attention_kwargs or self.fuses() is None:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)  # type: ignore[misc]
        query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        weights = weight_of(self.norm_q), weight_of(self.norm_k)
        options: dict[str, Any] = {
            "head_dim": query.shape[-1] // self.heads,
            "norm": "diffusers_rms",
            "eps": self.eps(),
            "rounding": self.rounding,
        }
        if encoder_hidden_states is None:
            query, key = qk_norm_rope(query, key, *weights, **options)
            value = value.unflatten(2, (self.heads, -1))
        else:
            query, key, value = joint_qk_norm_rope(
                query,
                key,
                value,
                *weights,
                None,
                self.add_q_proj(encoder_hidden_states),
                self.add_k_proj(encoder_hidden_states),
                self.add_v_proj(encoder_hidden_states),
                weight_of(self.norm_added_q),
                weight_of(self.norm_added_k),
                None,
                **options,
            )
        joint = self.upstream("F").scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), dropout_p=0.0, is_causal=False
        )
        joint = joint.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return self.project(joint)
        tokens = hidden_states.shape[1]
        image, text = joint[:, :tokens], joint[:, tokens:]
        if not self.context_pre_only:
            text = self.to_add_out(quantized_for(text, self.to_add_out))
        return self.project(quantized_for(image, self.to_out._modules["0"])), text


class SD35AdaLayerNormZeroX(Modulating, FusedUnit):
    """diffusers' ``SD35AdaLayerNormZeroX``: two modulations of one norm, for two attentions.

    The norm is computed twice: for Medium at 1024x1024 that reads 0.16 GB more in a step.
    """

    family = "SD3"
    names = frozenset({"SD35AdaLayerNormZeroX"})
    fingerprints = {"forward": frozenset({"0a720efa18a8"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    @classmethod
    def calls(cls, module: nn.Module, dtype: torch.dtype) -> Iterator[FusedCall]:
        """Two, of its one norm."""
        for _ in range(2):
            yield from super().calls(module, dtype)

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None, law: Wanted | None = None) -> tuple[Tensor, ...]:
        if not self.intact():
            return super().forward(hidden_states, emb)  # type: ignore[misc]
        emb = self.modulation(emb)  # type: ignore[arg-type]  # upstream's default; always given
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp, shift_msa2, scale_msa2, gate_msa2 = emb.chunk(9, dim=1)
        if untouched(self.norm) and not (torch.is_grad_enabled() and self.rounding == "eager"):
            x = modulated(self.norm, hidden_states, scale_msa, shift_msa, law=law)
            x2 = modulated(self.norm, hidden_states, scale_msa2, shift_msa2, law=law)
        else:  # one call, as upstream: somebody watches it, or gradients are to be summed before they go through it
            n = self.norm(hidden_states)
            x, x2 = modulate(n, scale_msa, shift_msa), modulate(n, scale_msa2, shift_msa2)
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp, x2, gate_msa2


class JointTransformerBlock(FusedBlock):
    """diffusers' ``JointTransformerBlock``: ``hidden_states`` [B, S, D], ``encoder_hidden_states``
    [B, T, D], ``temb`` [B, D]. The last one of a model returns None for the text.
    """

    family = "SD3"
    names = frozenset({"JointTransformerBlock"})
    fingerprints = {"forward": frozenset({"eaaa082d1fdb"})}  # 0.37.0 to 0.42.1
    sites = {
        "norm1": AdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
        "norm2": ScaleResidualNormScaleShift,
        "norm2_context": ScaleResidualNormScaleShift,
        "attn": SD3Attention,
        "attn2": SD3Attention,
    }
    residuals = 1

    @classmethod
    def sites_in(cls, module: Any) -> Mapping[str, type]:
        sites: dict[str, type] = dict(cls.sites)
        if module.use_dual_attention:
            sites["norm1"] = SD35AdaLayerNormZeroX
        else:
            del sites["attn2"]
        if module.context_pre_only:
            sites["norm1_context"] = AdaLayerNormContinuous
            del sites["norm2_context"]
        return _without_plain_attention(module, sites)

    @classmethod
    def calls(cls, module: Any, dtype: torch.dtype) -> Iterator[FusedCall]:
        yield from super().calls(module, dtype)
        for _ in range(module.use_dual_attention + (not module.context_pre_only)):
            yield Site("scale_residual", cls.width(module), dtype)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        if not self.intact():
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)  # type: ignore[misc]
        stream, kwargs = hidden_states, joint_attention_kwargs or {}
        hidden_states = _dense(hidden_states)
        law, c_law = ({}, {}) if kwargs else _laws(self, hidden_states, encoder_hidden_states)

        x, gate_msa, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(hidden_states, emb=temb, **law)
        if self.context_pre_only:
            c = self.norm1_context(encoder_hidden_states, temb)
        else:
            c, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb, **c_law)

        x, c = self.attn(hidden_states=x, encoder_hidden_states=c, **kwargs)

        hidden_states = promoted(hidden_states, gate_msa, self.rounding)
        if self.use_dual_attention:
            x2, gate_msa2 = second
            hidden_states = scale_residual(hidden_states, x, gate_msa, rounding=self.rounding)
            x, gate_msa = self.attn2(hidden_states=x2, **kwargs), gate_msa2
        ff_law = _law_in_feed_forward(self, self.ff, hidden_states)
        x, hidden_states = self.norm2(hidden_states, x, gate=gate_msa, scale=scale_mlp, shift=shift_mlp, law=ff_law)
        hidden_states = scale_residual(hidden_states, _feed_forward(self, self.ff, x), gate_mlp, rounding=self.rounding)
        hidden_states = laid_out_as(stream, hidden_states)
        if self.context_pre_only:
            return None, hidden_states

        encoder_hidden_states = promoted(encoder_hidden_states, c_gate_msa, self.rounding)
        ff_law = _law_in_feed_forward(self, self.ff_context, encoder_hidden_states)
        c, encoder_hidden_states = self.norm2_context(
            encoder_hidden_states, c, gate=c_gate_msa, scale=c_scale_mlp, shift=c_shift_mlp, law=ff_law
        )
        c = _feed_forward(self, self.ff_context, c)
        return scale_residual(encoder_hidden_states, c, c_gate_mlp, rounding=self.rounding), hidden_states


class SD3SingleTransformerBlock(FusedBlock):
    """diffusers' ``SD3SingleTransformerBlock``, of SD3.5 Large's ControlNets: ``hidden_states`` [B,
    S, D], ``temb`` [B, D].
    """

    family = "SD3"
    names = frozenset({"SD3SingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"409c8272c433"})}  # 0.37.0 to 0.42.1
    sites = {"norm1": AdaLayerNormZero, "norm2": ScaleResidualNormScaleShift, "attn": SD3Attention}
    residuals = 1

    @classmethod
    def sites_in(cls, module: Any) -> Mapping[str, type]:
        return _without_plain_attention(module, cls.sites)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        if not self.intact():
            return super().forward(hidden_states, temb)  # type: ignore[misc]
        stream, hidden_states = hidden_states, _dense(hidden_states)
        law = law_argument(self.norm1, law_in(self.attn, hidden_states, "to_q", "to_k", "to_v"))
        x, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb, **law)
        x = self.attn(hidden_states=x, encoder_hidden_states=None)

        hidden_states = promoted(hidden_states, gate_msa, self.rounding)
        ff_law = law_in_feed_forward(self.ff, hidden_states)
        x, hidden_states = self.norm2(hidden_states, x, gate=gate_msa, scale=scale_mlp, shift=shift_mlp, law=ff_law)
        return laid_out_as(stream, scale_residual(hidden_states, self.ff(x), gate_mlp, rounding=self.rounding))


def _dense(stream: Tensor) -> Tensor:
    """The stream in rows that the ops of a block read as they are. Not where it wants a gradient: a
    copy that several read would add up theirs before the stream does.
    """
    return stream if stream.requires_grad and torch.is_grad_enabled() else stream.contiguous()


def _without_plain_attention(module: Any, sites: Mapping[str, type]) -> Mapping[str, type]:
    """``sites`` without the attention of SD3.0, which has no norms of query and key."""
    plain = {path for path in ("attn", "attn2") if path in sites and getattr(getattr(module, path), "norm_q", None) is None}
    return {path: body for path, body in sites.items() if path not in plain}


def _laws(block: Any, x: Tensor, text: Tensor) -> tuple[dict[str, Wanted], dict[str, Wanted]]:
    """The laws by which the attention modules take the two streams, as arguments of the norms
    before them.
    """
    law = law_in(block.attn, x, "to_q", "to_k", "to_v")
    if law is not None and block.use_dual_attention:
        law = shared_law(law, law_in(block.attn2, x, "to_q", "to_k", "to_v"))
    text_law = None if block.context_pre_only else law_in(block.attn, text, "add_q_proj", "add_k_proj", "add_v_proj")
    return law_argument(block.norm1, law), law_argument(block.norm1_context, text_law)


def _feed_forward(block: Any, ff: nn.Module, x: Tensor) -> Tensor:
    """``ff(x)``, in chunks where the user asked for them (``enable_forward_chunking``)."""
    if block._chunk_size is None:
        return ff(x)
    return block.origin.forward.__globals__["_chunked_feed_forward"](ff, x, block._chunk_dim, block._chunk_size)


def _law_in_feed_forward(block: Any, ff: nn.Module, x: Tensor) -> Wanted | None:
    return law_in_feed_forward(ff, x) if block._chunk_size is None else None
