"""Attention of a stream to itself, to its text and to the other stream."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...functional import qk_norm_rope
from ...fused.attention import FusedAttention
from ...fused.laws import quantized_for
from ...fused.norms import weight_of
from ...fused.sites import FusedCall

Rotary = tuple[Tensor, Tensor]


class LTX2Attention(FusedAttention):
    """diffusers' ``LTX2Attention`` with one of its processors: the tokens' own attention, or that
    of what ``encoder_hidden_states`` has. Where a sample is perturbed it is upstream's.
    """

    fingerprints = {"forward": frozenset({"49027ebdcad2"})}  # 0.37.0 to 0.42.1, as the helpers
    processors = {
        # 0.37.0 and 0.37.1; 0.38.0 to 0.42.1, as the next. With what they take by name.
        "LTX2AudioVideoAttnProcessor": {"6c1bea2c0ac0": frozenset(), "87a9dda9ebdb": frozenset()},
        "LTX2PerturbedAttnProcessor": {"38e651df4523": frozenset({"perturbation_mask", "all_perturbed"})},
    }
    helpers = {
        "apply_split_rotary_emb": frozenset({"6d589884cfc8"}),
        "apply_interleaved_rotary_emb": frozenset({"2b1d509a4cfb"}),
    }
    norm = "rms"
    across = True
    rotary = "halves"

    @classmethod
    def calls(cls, module: Any, dtype: torch.dtype) -> Iterator[FusedCall]:
        """One; its rotary embedding may be of neighbours, with tables for each head, too."""
        for call in super().calls(module, dtype):
            yield call if module.rope_type == "split" else replace(call, rotary="per_element_of_head")  # type: ignore[type-var]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
        **kwargs: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        known = self.fuses()
        if (
            known is None
            or not kwargs.keys() <= known.form
            or any(value is not None and value is not False for value in kwargs.values())
            or not self.fits("qk_norm_rope", self.takes(hidden_states, context, query_rotary_emb, key_rotary_emb))
        ):
            return super().forward(  # type: ignore[misc]
                hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb, **kwargs
            )
        if attention_mask is not None:
            attention_mask = self.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
            attention_mask = attention_mask.view(context.shape[0], self.heads, -1, attention_mask.shape[-1])
        to_gate_logits = self._modules.get("to_gate_logits")
        gate_logits = None if to_gate_logits is None else to_gate_logits(hidden_states)

        if encoder_hidden_states is None:
            hidden_states = context = quantized_for(hidden_states, self.to_q, self.to_k, self.to_v)
        else:
            context = quantized_for(context, self.to_k, self.to_v)
        if known.form:  # each in its processor's order, in which gradients are summed
            value, query, key = self.to_v(context), self.to_q(hidden_states), self.to_k(context)
        else:
            query, key, value = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        query, key = qk_norm_rope(
            query,
            key,
            weight_of(self.norm_q),
            weight_of(self.norm_k),
            self.tables(query_rotary_emb),
            key_rotary=None if query_rotary_emb is None else self.tables(key_rotary_emb),
            head_dim=self.head_dim,
            norm="rms",
            eps=self.eps(),
            pairs="halves" if self.rope_type == "split" else "neighbours",
            rounding=self.rounding,
        )
        processor = self.processor
        attended = self.upstream("dispatch_attention_fn")(
            query,
            key,
            value.unflatten(2, (self.heads, -1)),
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        attended = attended.flatten(2, 3).to(query.dtype)
        if gate_logits is not None:
            gates = 2.0 * torch.sigmoid(gate_logits)
            attended = (attended.unflatten(2, (self.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return self.project(attended)

    def takes(self, x: Tensor, context: Tensor, rotary: Rotary | None, key_rotary: Rotary | None) -> bool:
        """Whether the fused path serves a call: tables are of the module's heads and of the tokens.
        Elsewhere upstream shares out the columns as the tables say.
        """
        if x.shape[0] != context.shape[0]:
            return False
        if rotary is None:
            return True
        return self._is_of(rotary, x) and self._is_of(rotary if key_rotary is None else key_rotary, context)

    def _is_of(self, rotary: Rotary, x: Tensor) -> bool:
        batch, tokens, _ = x.shape
        if self.rope_type == "split":
            return rotary[0].shape == (batch, self.heads, tokens, self.head_dim // 2)
        return rotary[0].shape == (batch, tokens, self.heads * self.head_dim)

    def tables(self, rotary: Rotary | None) -> Rotary | None:
        """As the op takes them: [B, S, H, d / 2] or, of neighbours, [B, S, H, d]."""
        if rotary is None:
            return None
        cos, sin = rotary
        if self.rope_type == "split":
            return cos.transpose(1, 2), sin.transpose(1, 2)
        return cos.unflatten(2, (self.heads, -1)), sin.unflatten(2, (self.heads, -1))
