"""FLUX.2 (dev) and FLUX.2 Klein: one modulation for all blocks of a kind, SwiGLU, and single-stream
blocks whose projections are one linear layer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import qk_norm_rope
from ..fused.activation import describe_silu_module, is_torchs_silu, silu_gated
from ..fused.activation_sites import Activation
from ..fused.attention import FusedAttention, law_in
from ..fused.block import FusedBlock
from ..fused.feed_forward import FeedForwardBody
from ..fused.flux import TEXT_FIRST, FluxAttention, Rotary, after_attention, dual_stream_laws, scale_residual_clipped
from ..fused.gelu import called_as_module
from ..fused.laws import hooked, law_for
from ..fused.module import FusedModule
from ..fused.norms import weight_of
from ..fused.promotion import modulated
from ..layers import LayerNormScaleShift, ScaleResidualNormScaleShift
from ..ops.quantization import Quantized, Wanted

NOTHING_TO_GAIN = {"Flux2Transformer2DModel": "one modulation serves all blocks of a kind"}


class Flux2SwiGLU(FusedModule):
    """diffusers' class of this name: [..., 2 * D] -> [..., D]."""

    fingerprints = {"forward": frozenset({"ff1466e9428a", "aa6f5cb2d04c"})}  # 0.37.0, 0.37.1, 0.38.0; 0.39.0 to 0.42.1

    written_for = frozenset({"diffusers.models.transformers.transformer_flux2.Flux2SwiGLU"})
    optional = True
    reported_as = "activation"

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        yield describe_silu_module("gate_fn", module.gate_fn)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(None, x) if self.intact() and is_torchs_silu(self.gate_fn) else super().forward(x)  # type: ignore[misc]

    def joins(self) -> bool:
        """Whether :meth:`behind` may stand for a call: nobody looks at it."""
        return self.intact() and called_as_module(self) and is_torchs_silu(self.gate_fn)  # type: ignore[arg-type]

    def behind(self, beside: Tensor | None, x: Tensor, reader: Any = None) -> Any:
        """The result, behind ``beside`` along the last dim; see :func:`silu_gated`."""
        gate, value = x.chunk(2, dim=-1)
        return silu_gated(gate, value, beside, rounding=self.rounding, reader=reader)


class Flux2FeedForward(FeedForwardBody):
    """diffusers' class of this name with quantised weights: [..., D], or what that was quantised
    to -> [..., D].
    """

    fingerprints = {"forward": frozenset({"8ef7f54eaff5"})}  # 0.37.0 to 0.42.1

    optional = True

    def forward(self, x: Tensor | Quantized) -> Tensor:
        activation = self.act_fn
        if not self.intact() or not isinstance(activation, Flux2SwiGLU) or not activation.joins():
            return super().forward(x)  # type: ignore[misc]
        return self.linear_out(activation.behind(None, self.linear_in(x), self.linear_out))

    def law(self, x: Tensor) -> Wanted | None:
        if hooked(self) or not self.intact():
            return None
        return law_for(x, self.linear_in)


class Flux2Attention(FluxAttention):
    """diffusers' ``Flux2Attention`` with its ``Flux2AttnProcessor``: joint attention, the text's
    tokens first.
    """

    fingerprints = {"forward": frozenset({"c6aa0aa6cc46"})}  # 0.37.0 to 0.42.1
    processors = {"Flux2AttnProcessor": {"fce078cf5c3d": TEXT_FIRST, "700767ff6bca": TEXT_FIRST}}  # to 0.39.0; to 0.42.1
    ignored = frozenset()

    def takes(self, x: Any, text: Any, rotary: Rotary | None) -> bool:
        """As of :class:`FluxAttention`, with text."""
        return text is not None and super().takes(x, text, rotary)


class Flux2ParallelSelfAttention(FusedAttention):
    """diffusers' class of this name with its ``Flux2ParallelSelfAttnProcessor``: attention and MLP
    side by side.
    """

    fingerprints = {"forward": frozenset({"4c78701fb034"})}  # 0.37.0 to 0.42.1
    processors = {"Flux2ParallelSelfAttnProcessor": {"71937d6d5667": None, "9df53d37e934": None}}  # to 0.39.0; to 0.42.1
    helpers = {"apply_rotary_emb": frozenset({"16054305ef24"})}  # 0.37.0 to 0.42.1
    norm = "rms"
    rotary = "per_element"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, image_rotary_emb: Rotary | None = None, **kwargs: Any
    ) -> Tensor:
        if self.fuses() is None or kwargs or not self.fits("qk_norm_rope", _aligned(hidden_states, image_rotary_emb)):
            return super().forward(hidden_states, attention_mask, image_rotary_emb, **kwargs)  # type: ignore[misc]
        x = self.to_qkv_mlp_proj(hidden_states)
        qkv_dim, mlp_dim = 3 * self.inner_dim, self.mlp_hidden_dim * self.mlp_mult_factor
        own = x.shape[-1] * qkv_dim // (qkv_dim + mlp_dim)  # tensor parallelism leaves a share of each
        qkv, mlp = x.split([own, x.shape[-1] - own], dim=-1)
        query, key, value = qkv.chunk(3, dim=-1)
        query, key = qk_norm_rope(
            query,
            key,
            weight_of(self.norm_q),
            weight_of(self.norm_k),
            image_rotary_emb,
            head_dim=self.head_dim,
            norm="rms",
            eps=self.eps(),
            rounding=self.rounding,
        )
        processor = self.processor
        attended = self.upstream("dispatch_attention_fn")(
            query,
            key,
            value.unflatten(-1, (-1, self.head_dim)),
            attn_mask=attention_mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        attended = attended.flatten(2, 3).to(query.dtype)
        activation = self.mlp_act_fn
        if isinstance(activation, Flux2SwiGLU) and activation.joins():
            attended = activation.behind(attended, mlp, self.to_out)
        else:
            attended = torch.cat([attended, activation(mlp)], dim=-1)
        del x, qkv, mlp, query, key, value  # none of them needs to be alive while to_out runs
        return self.to_out(attended)


def _aligned(x: Any, rotary: Rotary | None) -> bool:
    """Whether the tables are of the length of ``x``, and where it is."""
    return rotary is None or (rotary[0].shape[0] == x.shape[1] and rotary[0].device == x.device)


class Flux2TransformerBlock(FusedBlock):
    """diffusers' ``Flux2TransformerBlock``: ``hidden_states`` [B, S, D], ``encoder_hidden_states``
    [B, T, D], ``temb_mod_*`` [B, 6 * D] or of each token [B, S or T, 6 * D].
    """

    family = "FLUX.2"
    names = frozenset({"Flux2TransformerBlock"})
    fingerprints = {"forward": frozenset({"de504f80779b"})}  # 0.37.0 to 0.42.1
    sites = {
        "norm1": LayerNormScaleShift,
        "norm1_context": LayerNormScaleShift,
        "norm2": ScaleResidualNormScaleShift,
        "norm2_context": ScaleResidualNormScaleShift,
        "attn": Flux2Attention,
    }
    anywhere = (*FusedBlock.anywhere, Flux2SwiGLU, Flux2FeedForward)
    residuals = 2

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, image_rotary_emb, joint_attention_kwargs
            )
        kwargs = joint_attention_kwargs or {}
        (shift_msa, scale_msa, gate_msa), (shift_mlp, scale_mlp, gate_mlp) = _split(self, temb_mod_img, 2)
        (c_shift_msa, c_scale_msa, c_gate_msa), (c_shift_mlp, c_scale_mlp, c_gate_mlp) = _split(self, temb_mod_txt, 2)
        law, c_law = dual_stream_laws(self.attn, hidden_states, encoder_hidden_states, image_rotary_emb, kwargs)

        outputs = [
            *self.attn(
                hidden_states=modulated(self.norm1, hidden_states, scale_msa, shift_msa, law=law),
                encoder_hidden_states=modulated(self.norm1_context, encoder_hidden_states, c_scale_msa, c_shift_msa, law=c_law),
                image_rotary_emb=image_rotary_emb,
                **kwargs,
            )
        ]
        modulation, c_modulation = [gate_msa, shift_mlp, scale_mlp, gate_mlp], [c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp]
        return after_attention(self, hidden_states, encoder_hidden_states, outputs, modulation, c_modulation)


class Flux2SingleTransformerBlock(FusedBlock):
    """diffusers' ``Flux2SingleTransformerBlock``: ``hidden_states`` [B, T + S, D], or the image's
    [B, S, D] with the text's beside it; ``temb_mod`` [B, 3 * D] or of each token [B, T + S, 3 * D].
    """

    family = "FLUX.2"
    names = frozenset({"Flux2SingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"16ca867785e7"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift, "attn": Flux2ParallelSelfAttention}
    anywhere = (*FusedBlock.anywhere, Flux2SwiGLU)
    residuals = 1

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(  # type: ignore[misc]
                hidden_states,
                encoder_hidden_states,
                temb_mod,
                image_rotary_emb,
                joint_attention_kwargs,
                split_hidden_states,
                text_seq_len,
            )
        if encoder_hidden_states is not None:
            text_seq_len = encoder_hidden_states.shape[1]
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        kwargs = joint_attention_kwargs or {}
        ((shift, scale, gate),) = _split(self, temb_mod, 1)
        law = None if kwargs or not _aligned(hidden_states, image_rotary_emb) else law_in(self.attn, hidden_states, "to_qkv_mlp_proj")

        x = modulated(self.norm, hidden_states, scale, shift, law=law)
        x = self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **kwargs)
        hidden_states = scale_residual_clipped(hidden_states, x, gate, self.rounding)
        if split_hidden_states:
            return hidden_states[:, :text_seq_len], hidden_states[:, text_seq_len:]
        return hidden_states


def _split(block: Any, modulation: Tensor, sets: int) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
    """Shift, scale and gate, each [B, 1, D] or [B, S, D], as upstream's block splits them."""
    return type(block).origin.forward.__globals__["Flux2Modulation"].split(modulation, sets)
