"""FLUX.1's attention, and the halves of its blocks that its relatives share."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..functional import joint_qk_norm_rope, qk_norm_rope, scale_residual
from ..layers.base import parameter
from ..ops.context import transformed
from ..ops.quantization import Wanted
from ..swapping.swapped import untouched
from ..swapping.torch_private import seen_by_a_mode
from .activation import join_mlp, start_mlp
from .adaln import law_argument
from .attention import ADDED, OWN, FusedAttention, law_in, laws_in
from .feed_forward import law_in_feed_forward
from .laws import dense_for, law_for, shared_law
from .norms import dtype_of, weight_of
from .promotion import promoted

Rotary = tuple[Tensor, Tensor]

# How a processor hands the streams to the last projections: copied to be contiguous, on which the
# bits of these depend, or as they are, with the text projected after the image or before it.
CONTIGUOUS, AS_IS, TEXT_FIRST = "contiguous", "as it is", "text first"


class FluxAttention(FusedAttention):
    """diffusers' ``FluxAttention`` with its ``FluxAttnProcessor``: of a dual-stream block joint
    attention, the text's tokens first; of a single-stream block, one sequence. Both are rotated
    whole.
    """

    fingerprints = {"forward": frozenset({"37829ce5d9bf", "e3a1c43abbca"})}  # 0.37.0 to 0.42.1; in Bria
    processors = {
        "FluxAttnProcessor": {"f22ef9044dc6": CONTIGUOUS, "58ebc71f6c94": CONTIGUOUS},  # 0.37.0 to 0.39.0; 0.40.0 to 0.42.1
        "BriaFiboAttnProcessor": {"f22ef9044dc6": CONTIGUOUS},  # 0.37.0 to 0.42.1, as the next
        "LongCatImageAttnProcessor": {"ea7746a9c1f9": AS_IS},
        "BriaAttnProcessor": {"ea7746a9c1f9": AS_IS},
        "OvisImageAttnProcessor": {"ea7746a9c1f9": AS_IS},
    }
    helpers = {"apply_rotary_emb": frozenset({"16054305ef24"})}  # 0.37.0 to 0.42.1
    norm = "rms"
    rotary = "per_element"
    ignored: ClassVar[frozenset[str]] = frozenset({"ip_adapter_masks", "ip_hidden_states"})
    """Arguments that upstream drops without a word where the processor has none of that name."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        op = "qk_norm_rope" if encoder_hidden_states is None else "joint_qk_norm_rope"
        known = self.fuses()
        if (
            known is None
            or not kwargs.keys() <= self.ignored
            or not self.fits(op, self.takes(hidden_states, encoder_hidden_states, image_rotary_emb))
        ):
            kwargs["image_rotary_emb"] = image_rotary_emb
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)  # type: ignore[misc]

        query, key, value, text_query, text_key, text_value = self.upstream("_get_qkv_projections")(
            self, hidden_states, encoder_hidden_states
        )
        weights = weight_of(self.norm_q), weight_of(self.norm_k)
        options: dict[str, Any] = {
            "head_dim": self.width_of_head(),
            "norm": self.norm,
            "eps": self.eps(),
            "rounding": self.rounding,
        }
        if encoder_hidden_states is None:
            query, key = qk_norm_rope(query, key, *weights, image_rotary_emb, **options)
            value = value.unflatten(-1, (-1, options["head_dim"]))
        else:
            query, key, value = joint_qk_norm_rope(
                query,
                key,
                value,
                *weights,
                _tokens(image_rotary_emb, slice(text, None)),
                text_query,
                text_key,
                text_value,
                weight_of(self.norm_added_q),
                weight_of(self.norm_added_k),
                _tokens(image_rotary_emb, slice(text)),
                encoder_first=True,
                **options,
            )
        processor = self.processor
        attended = self.upstream("dispatch_attention_fn")(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        attended = attended.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return attended
        image, words, to_add_out = attended[:, text:], attended[:, :text], self.to_add_out
        to_out, dropout, *_ = self.to_out._modules.values()
        if known.form == TEXT_FIRST:
            words = to_add_out(words)
            return dropout(to_out(image)), words
        if known.form == CONTIGUOUS:
            image = dropout(to_out(dense_for(image, to_out)))
            return image, to_add_out(dense_for(words, to_add_out))
        return dropout(to_out(image)), to_add_out(words)

    def takes(self, x: Any, text: Any, rotary: Rotary | None) -> bool:
        """Whether the fused path serves a call: its streams are those that the module has
        projections for, and have one dtype, since upstream rotates them joined; its tables are as
        long as they are, and on their device. Otherwise upstream's forward runs, and says in its
        own words what is wrong.
        """
        tokens = x.shape[1] if text is None else x.shape[1] + text.shape[1]
        if rotary is not None and (rotary[0].shape[0] != tokens or rotary[0].device != x.device):
            return False
        if text is None:
            return self.added_kv_proj_dim is None
        return self.added_kv_proj_dim is not None and x.dtype is text.dtype and _norms_alike(self)

    def width_of_head(self) -> int:
        """How many columns of query, key and value belong to one head."""
        return self.head_dim


def _norms_alike(attn: Any) -> bool:
    """Whether the norms make query and key of both streams of one dtype."""
    modules = attn._modules
    dtypes = [dtype_of(parameter(modules[name], "weight")) for name in ("norm_q", "norm_added_q", "norm_k", "norm_added_k")]
    return dtypes[0] is dtypes[1] and dtypes[2] is dtypes[3]


def _tokens(rotary: Rotary | None, part: slice) -> Rotary | None:
    return None if rotary is None else (rotary[0][part], rotary[1][part])


def dual_stream_laws(
    attn: Any, x: Tensor, text: Tensor, rotary: Rotary | None, kwargs: dict[str, Any]
) -> tuple[Wanted | None, Wanted | None]:
    """The laws by which the attention module of a dual-stream block takes its two streams."""
    own, added = _projections(attn)
    law, text_law = laws_in(attn, (x, own), (text, added))
    taken = (law is not None or text_law is not None) and kwargs.keys() <= attn.ignored and attn.takes(x, text, rotary)
    return (law, text_law) if taken else (None, None)


def single_stream_law(block: Any, x: Tensor, rotary: Rotary | None, kwargs: dict[str, Any]) -> dict[str, Wanted]:
    """The law by which attention and MLP of a single-stream block take the stream, as an argument
    of the block's norm.
    """
    attn = block.attn
    law = law_in(attn, x, *_projections(attn)[0])
    taken = law is not None and kwargs.keys() <= attn.ignored and attn.takes(x, None, rotary)
    return law_argument(block.norm, shared_law(law, law_for(x, block.proj_mlp))) if taken else {}


def _projections(attn: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if getattr(attn, "fused_projections", False):
        return ("to_qkv",), ("to_added_qkv",)
    return OWN, ADDED


def after_attention(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    outputs: list[Tensor],
    modulation: list[Tensor],
    c_modulation: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The residuals and feed-forward layers of a dual-stream block. ``outputs``: attention's for
    both streams, and that of an IP-Adapter where there is one. It is emptied: memory peaks in the
    MLP, where nothing of attention's is to be alive.
    """
    x, c, *of_adapter = outputs
    outputs.clear()
    gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
    c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_modulation
    rounding = block.rounding

    hidden_states = promoted(hidden_states, gate_msa, rounding)
    law = law_in_feed_forward(block.ff, hidden_states)
    x, hidden_states = block.norm2(hidden_states, x, gate=gate_msa, scale=scale_mlp, shift=shift_mlp, law=law)
    hidden_states = scale_residual(hidden_states, block.ff(x), gate_mlp, rounding=rounding)
    for output in of_adapter:
        hidden_states = hidden_states + output

    encoder_hidden_states = promoted(encoder_hidden_states, c_gate_msa, rounding)
    law = law_in_feed_forward(block.ff_context, encoder_hidden_states)
    c, encoder_hidden_states = block.norm2_context(encoder_hidden_states, c, gate=c_gate_msa, scale=c_scale_mlp, shift=c_shift_mlp, law=law)
    encoder_hidden_states = scale_residual(encoder_hidden_states, block.ff_context(c), c_gate_mlp, rounding=rounding)
    return clipped(encoder_hidden_states), hidden_states


def one_sequence(block: Any, first: Tensor, second: Tensor) -> Tensor:
    """Two streams [B, T, D] and [B, S, D] as one [B, T + S, D]: where they lie in memory, if the
    block before has returned them as parts of one tensor, else copied.

    Upstream copies in any case, so somebody who is shown the sequence may write to it.
    """
    norm = block.norm
    if _side_by_side(first, second) and untouched(norm, norm.norm):
        batch, tokens, width = first.shape
        tokens += second.shape[1]
        return first.as_strided((batch, tokens, width), (first.stride(0) if batch > 1 else tokens * width, width, 1))
    return torch.cat([first, second], dim=1)


def _side_by_side(first: Tensor, second: Tensor) -> bool:
    """Whether in one storage each sample of ``second`` follows that of ``first``, all rows
    dense.
    """
    if transformed() or type(first) is not Tensor or type(second) is not Tensor:
        return False
    if first.requires_grad or second.requires_grad or first.dtype is not second.dtype or seen_by_a_mode():
        return False
    (batch, tokens, width), (_, others, _) = first.shape, second.shape
    dense = width, 1
    return (
        first.stride()[1:] == dense == second.stride()[1:]
        and second.shape[0] == batch
        and second.shape[2] == width
        and (batch == 1 or first.stride(0) == second.stride(0) >= (tokens + others) * width)
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and second.storage_offset() == first.storage_offset() + tokens * width
    )


def single_stream(block: Any, x: Tensor, temb: Tensor, rotary: Rotary | None, kwargs: dict[str, Any], **more: Any) -> Tensor:
    """A block with attention and MLP side by side over one sequence: [B, N, D] -> [B, N, D]."""
    residual = x
    x, gate = block.norm(x, emb=temb, **single_stream_law(block, x, rotary, kwargs))
    mlp, pending = start_mlp(block.act_mlp, block.proj_mlp, x, block.rounding)
    x = block.attn(hidden_states=x, image_rotary_emb=rotary, **more, **kwargs)
    x = join_mlp(x, mlp, pending, block.rounding, block.proj_out)
    del mlp  # like the earlier x it needn't be alive while proj_out runs
    return scale_residual_clipped(residual, block.proj_out(x), gate, block.rounding)


def scale_residual_clipped(residual: Tensor, x: Tensor, gate: Tensor, rounding: str) -> Tensor:
    """``residual + gate * x`` of a single-stream block."""
    return clipped(scale_residual(promoted(residual, gate, rounding), x, gate, rounding=rounding))


def clipped(x: Tensor) -> Tensor:
    """float16 without infinities, as upstream does it."""
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x
