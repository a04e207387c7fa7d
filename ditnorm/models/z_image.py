"""Z-Image: Turbo, Base, Edit, Omni, ControlNet."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..functional import qk_norm_rope
from ..fused.activation import describe_silu_function, silu_gated
from ..fused.activation_sites import Activation
from ..fused.attention import FusedAttention
from ..fused.block import FusedUnit
from ..fused.laws import quantized_for
from ..fused.module import FusedModule
from ..fused.norms import DiffusersRMSNormScaleShift, ScaleResidualDiffusersRMSNormScaleShift, weight_of
from ..fused.promotion import modulated, no_shift
from ..fused.sandwich import SandwichBlock
from ..layers import LayerNormScaleShift

_SELECTS = {"select_per_token": frozenset({"9880bcee7d35"})}  # 0.37.0 to 0.42.1


NOTHING_TO_GAIN = dict.fromkeys(
    ("ZImageTransformer2DModel", "ZImageControlNetModel"), "its modulations are made of 256 numbers, by a fiftieth of its weights"
)


class ZImageAttention(FusedAttention):
    """diffusers' ``Attention`` with Z-Image's processor: one stream."""

    fingerprints = {"forward": frozenset({"f24e3a146064"})}  # 0.37.0 to 0.42.1
    processors = {
        "diffusers.models.transformers.transformer_z_image:ZSingleStreamAttnProcessor": {"6074245aeee3": None},
        "diffusers.models.controlnets.controlnet_z_image:ZSingleStreamAttnProcessor": {"6074245aeee3": None},
    }
    helpers = {}
    norm = "diffusers_rms"
    rotary = "complex"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        kwargs = dict(cross_attention_kwargs)
        freqs_cis = kwargs.pop("freqs_cis", None)
        aligned = freqs_cis is None or freqs_cis.shape[1] == hidden_states.shape[1]
        if kwargs or self.fuses() is None or not self.fits("qk_norm_rope", aligned):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)  # type: ignore[misc]
        shared = quantized_for(hidden_states, self.to_q, self.to_k, self.to_v)
        query, key, value = self.to_q(shared), self.to_k(shared), self.to_v(shared)
        query, key = qk_norm_rope(
            query,
            key,
            weight_of(self.norm_q),
            weight_of(self.norm_k),
            freqs_cis,
            head_dim=query.shape[-1] // self.heads,
            norm="diffusers_rms",
            eps=self.eps(),
            rounding=self.rounding,
        )
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        processor = self.processor
        hidden_states = self.upstream("dispatch_attention_fn")(
            query,
            key,
            value.unflatten(-1, (self.heads, -1)),
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        output = self.to_out[0](hidden_states.flatten(2, 3).to(query.dtype))
        return self.to_out[1](output) if len(self.to_out) > 1 else output


class ZImageFeedForward(FusedModule):
    """diffusers' ``FeedForward`` of Z-Image: [..., D] -> [..., D]."""

    fingerprints = {"forward": frozenset({"ced537828999"}), "_forward_silu_gating": frozenset({"07067d2d0ac3"})}  # 0.37.0 to 0.42.1
    optional = True
    reported_as = "activation"

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        yield describe_silu_function("")

    def forward(self, x: Tensor) -> Tensor:
        if not self.intact():
            return super().forward(x)  # type: ignore[misc]
        shared = quantized_for(x, self.w1, self.w3)
        return self.w2(silu_gated(self.w1(shared), self.w3(shared), rounding=self.rounding, reader=self.w2))


def _rows(noisy: Tensor, clean: Tensor) -> Tensor:
    """[B, N] each -> [B, 2, N]: the rows that a mask of noisy tokens selects from."""
    return torch.stack([clean, noisy], dim=1)


class ZImageTransformerBlock(SandwichBlock):
    """diffusers' ``ZImageTransformerBlock``: ``x`` [B, S, D], ``adaln_input`` [B, N].

    With ``noise_mask`` [B, S] tokens where it is 1 are modulated as of ``adaln_noisy``, the others
    as of ``adaln_clean``.
    """

    family = "Z-Image"
    names = frozenset({"ZImageTransformerBlock"})
    fingerprints = {"forward": frozenset({"83affbd9b5f6"})}  # 0.37.0 to 0.42.1
    functions = _SELECTS
    sites = {
        "attention_norm1": DiffusersRMSNormScaleShift,
        "attention_norm2": DiffusersRMSNormScaleShift,
        "ffn_norm1": ScaleResidualDiffusersRMSNormScaleShift,
        "ffn_norm2": DiffusersRMSNormScaleShift,
        "attention": ZImageAttention,
        "feed_forward": ZImageFeedForward,
    }
    branches = {"attention_norm2": "ffn_norm1", "ffn_norm2": None}

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
    ) -> Tensor:
        if not self.intact():
            return super().forward(x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)  # type: ignore[misc]
        if not self.modulation:
            return self.layers(x, attn_mask, freqs_cis)
        if noise_mask is None:
            return self.layers(x, attn_mask, freqs_cis, self.adaLN_modulation(adaln_input).unsqueeze(1))
        modulation = _rows(self.adaLN_modulation(adaln_noisy), self.adaLN_modulation(adaln_clean))
        return self.layers(x, attn_mask, freqs_cis, modulation, noise_mask == 1)

    def layers(
        self, x: Tensor, attn_mask: Tensor, freqs_cis: Tensor, modulation: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Attention and feed-forward: ``modulation`` [B, 1, 4 * D], or rows [B, 2, 4 * D] that
        ``index`` [B, S] selects from.
        """
        if modulation is None:
            branch = self.attention(self.attention_norm1(x), attention_mask=attn_mask, freqs_cis=freqs_cis)
            branch, x = self.add_and_norm("attention_norm2", x, branch)
            return self.add("ffn_norm2", x, self.feed_forward(branch))
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=2)
        gate_msa, gate_mlp = gate_msa.tanh(), gate_mlp.tanh()
        branch = self.attention(self.attention_norm1(x, scale=scale_msa, index=index), attention_mask=attn_mask, freqs_cis=freqs_cis)
        branch, x = self.add_and_norm("attention_norm2", x, branch, gate_msa, scale_mlp, index)
        return self.add("ffn_norm2", x, self.feed_forward(branch), gate_mlp, index)


class ZImageControlTransformerBlock(ZImageTransformerBlock):
    """diffusers' ``ZImageControlTransformerBlock``: ``c`` [B, S, D] in the first block, a stack of
    such in the others, with what is added to the model's stream.
    """

    names = frozenset({"ZImageControlTransformerBlock"})
    fingerprints = {"forward": frozenset({"0ea63f38df30"})}  # 0.37.0 to 0.42.1
    functions = {}

    def forward(  # type: ignore[override]
        self, c: Tensor, x: Tensor, attn_mask: Tensor, freqs_cis: Tensor, adaln_input: Tensor | None = None
    ) -> Tensor:
        if not self.intact() or (self.modulation and adaln_input is None):
            return super(ZImageTransformerBlock, self).forward(c, x, attn_mask, freqs_cis, adaln_input)  # type: ignore[misc]
        all_c: list[Tensor] = []
        if self.block_id == 0:
            c = self.before_proj(c) + x
        else:
            *all_c, c = torch.unbind(c)
        modulation = self.adaLN_modulation(adaln_input).unsqueeze(1) if self.modulation else None
        c = self.layers(c, attn_mask, freqs_cis, modulation)
        return torch.stack([*all_c, self.after_proj(c), c])


class ZImageFinalLayer(FusedUnit):
    """diffusers' ``FinalLayer`` of Z-Image: ``x`` [B, S, D], ``c`` [B, N]."""

    family = "Z-Image"
    fingerprints = {"forward": frozenset({"5b4cd01b7f95"})}  # 0.37.0 to 0.42.1
    functions = _SELECTS
    sites = {"norm_final": LayerNormScaleShift}

    def forward(
        self,
        x: Tensor,
        c: Tensor | None = None,
        noise_mask: Tensor | None = None,
        c_noisy: Tensor | None = None,
        c_clean: Tensor | None = None,
    ) -> Tensor:
        if not self.intact() or (noise_mask is None and c is None):
            return super().forward(x, c, noise_mask, c_noisy, c_clean)  # type: ignore[misc]
        if noise_mask is not None:
            scale, index = _rows(self.adaLN_modulation(c_noisy), self.adaLN_modulation(c_clean)), noise_mask == 1
        else:
            scale, index = self.adaLN_modulation(c).unsqueeze(1), None
        return self.linear(modulated(self.norm_final, x, scale, no_shift(scale), index))
