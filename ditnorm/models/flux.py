"""FLUX.1 (dev, schnell, Krea, Kontext, Fill, Depth, Canny, Redux), its ControlNets, and
LongCat-Image, whose blocks are the same; Bria, whose blocks are the same but for a name, and
Bria-FIBO. The dual-stream blocks of Ovis-Image are FLUX.1's, too.
"""

from typing import Any

from torch import Tensor

from ..fused.activation import JoinedGELU
from ..fused.adaln import AdaLayerNormZero, AdaLayerNormZeroSingle, law_argument
from ..fused.block import FusedBlock
from ..fused.flux import AS_IS, FluxAttention, Rotary, after_attention, dual_stream_laws, one_sequence, single_stream
from ..fused.modulation import ModulatedModel
from ..layers import ScaleResidualNormScaleShift

_TAKERS = ("transformer_blocks", "single_transformer_blocks", "norm_out")

MODULATED = (
    ModulatedModel(
        names=frozenset({"FluxTransformer2DModel"}),
        forward=frozenset({"e8317afd3bb3"}),  # 0.37.0 to 0.42.1
        embedding="time_text_embed",
        takers=_TAKERS,
        times=1000,
    ),
    ModulatedModel(
        names=frozenset({"LongCatImageTransformer2DModel"}),
        forward=frozenset({"aab2231144ae"}),  # 0.37.0 to 0.42.1
        embedding="time_embed",
        takers=_TAKERS,
        times=1000,
    ),
    ModulatedModel(
        names=frozenset({"FluxControlNetModel"}),
        forward=frozenset({"f2d56eb02110"}),  # 0.37.0 to 0.42.1
        embedding="time_text_embed",
        takers=("transformer_blocks", "single_transformer_blocks"),
        times=1000,
    ),
    ModulatedModel(
        names=frozenset({"BriaTransformer2DModel", "BriaFiboTransformer2DModel"}),
        forward=frozenset({"72947045e994", "4c82b3eee959"}),  # 0.37.0 to 0.42.1
        embedding="time_embed",
        takers=_TAKERS,
        changed_by="guidance_embed",
    ),
    ModulatedModel(
        names=frozenset({"OvisImageTransformer2DModel"}),
        forward=frozenset({"77ae4f466d64"}),  # 0.37.0 to 0.42.1
        embedding="timestep_embedder",
        takers=_TAKERS,
        times=1000,
        projection="time_proj",
    ),
)


class FluxTransformerBlock(FusedBlock):
    """diffusers' ``FluxTransformerBlock``: ``hidden_states`` [B, S, D], ``encoder_hidden_states``
    [B, T, D], ``temb`` [B, D].
    """

    family = "FLUX.1"
    names = frozenset({"FluxTransformerBlock", "LongCatImageTransformerBlock", "OvisImageTransformerBlock", "BriaFiboTransformerBlock"})
    fingerprints = {"forward": frozenset({"79063c34aa1e"})}  # 0.37.0 to 0.42.1, in all four
    sites = {
        "norm1": AdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
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
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)  # type: ignore[misc]
        kwargs = joint_attention_kwargs or {}
        law, c_law = dual_stream_laws(self.attn, hidden_states, encoder_hidden_states, image_rotary_emb, kwargs)
        x, *modulation = self.norm1(hidden_states, emb=temb, **law_argument(self.norm1, law))
        c, *c_modulation = self.norm1_context(encoder_hidden_states, emb=temb, **law_argument(self.norm1_context, c_law))

        outputs = [*self.attn(hidden_states=x, encoder_hidden_states=c, image_rotary_emb=image_rotary_emb, **kwargs)]
        del x, c  # memory peaks in the MLP
        return after_attention(self, hidden_states, encoder_hidden_states, outputs, modulation, c_modulation)


class FluxSingleTransformerBlock(JoinedGELU, FusedBlock):
    """diffusers' ``FluxSingleTransformerBlock``: attention and MLP side by side over both streams
    as one, the text first.
    """

    family = "FLUX.1"
    names = frozenset({"FluxSingleTransformerBlock", "LongCatImageSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"a492458833e9"})}  # 0.37.0 to 0.42.1, in both
    sites = {"norm": AdaLayerNormZeroSingle, "attn": FluxAttention}
    residuals = 1

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
        text = encoder_hidden_states.shape[1]
        x = one_sequence(self, encoder_hidden_states, hidden_states)
        x = single_stream(self, x, temb, image_rotary_emb, joint_attention_kwargs or {})
        return x[:, :text], x[:, text:]


class BriaTransformerBlock(FluxTransformerBlock):
    """diffusers' ``BriaTransformerBlock``."""

    names = frozenset({"BriaTransformerBlock"})
    fingerprints = {"forward": frozenset({"bc347cab02ed"})}  # 0.37.0 to 0.42.1

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)


class BriaSingleTransformerBlock(FluxSingleTransformerBlock):
    """diffusers' ``BriaSingleTransformerBlock``."""

    names = frozenset({"BriaSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"3e61dfdc069a"})}  # 0.37.0 to 0.42.1

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)


class BriaFiboSingleAttention(FluxAttention):
    """diffusers' ``Attention`` with Bria's processor, as a single-stream block of FIBO has it."""

    fingerprints = {"forward": frozenset({"f24e3a146064"})}  # 0.37.0 to 0.42.1
    processors = {"diffusers.models.transformers.transformer_bria:BriaAttnProcessor": {"ea7746a9c1f9": AS_IS}}  # 0.37.0 to 0.42.1
    norm = "diffusers_rms"

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)

    def width_of_head(self) -> int:
        """Computed, since ``Attention`` has no ``head_dim``."""
        return self.inner_dim // self.heads


class BriaFiboSingleTransformerBlock(JoinedGELU, FusedBlock):
    """diffusers' ``BriaFiboSingleTransformerBlock``: ``hidden_states`` [B, T + S, D], ``temb`` [B,
    D].
    """

    family = "FLUX.1"
    names = frozenset({"BriaFiboSingleTransformerBlock"})
    fingerprints = {"forward": frozenset({"5f0af9e5bc03"})}  # 0.37.0 to 0.42.1
    sites = {"norm": AdaLayerNormZeroSingle, "attn": BriaFiboSingleAttention}
    residuals = 1

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        if not self.intact():
            return super().forward(hidden_states, temb, image_rotary_emb, joint_attention_kwargs)  # type: ignore[misc]
        return single_stream(self, hidden_states, temb, image_rotary_emb, joint_attention_kwargs or {})
