"""HunyuanVideo (text-to-video, both image-to-video kinds, Framepack), HunyuanVideo-1.5,
HunyuanImage-2.1.
"""

from ...fused.modulation import ModulatedModel
from .attention import HunyuanVideoAttention
from .blocks import HunyuanImageTransformerBlock, HunyuanVideoSingleTransformerBlock, HunyuanVideoTransformerBlock
from .token_replace import (
    HunyuanVideoTokenReplaceAdaLayerNormZero,
    HunyuanVideoTokenReplaceAdaLayerNormZeroSingle,
    HunyuanVideoTokenReplaceSingleTransformerBlock,
    HunyuanVideoTokenReplaceTransformerBlock,
)

__all__ = [
    "MODULATED",
    "HunyuanImageTransformerBlock",
    "HunyuanVideoAttention",
    "HunyuanVideoSingleTransformerBlock",
    "HunyuanVideoTokenReplaceAdaLayerNormZero",
    "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle",
    "HunyuanVideoTokenReplaceSingleTransformerBlock",
    "HunyuanVideoTokenReplaceTransformerBlock",
    "HunyuanVideoTransformerBlock",
]

MODULATED = (
    ModulatedModel(
        names=frozenset({"HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"}),
        forward=frozenset({"30f3bd1c7313", "26e5a6cf8721"}),  # 0.37.0 to 0.42.1
        embedding="time_text_embed",
        takers=("transformer_blocks", "single_transformer_blocks", "norm_out"),
    ),
    ModulatedModel(
        names=frozenset({"HunyuanVideo15Transformer3DModel"}),
        forward=frozenset({"490537a446a4"}),  # 0.37.0 to 0.42.1
        embedding="time_embed",
        takers=("transformer_blocks", "norm_out"),
    ),
    ModulatedModel(
        names=frozenset({"HunyuanImageTransformer2DModel"}),
        forward=frozenset({"55d1a12efe80"}),  # 0.37.0 to 0.42.1
        embedding="time_guidance_embed",
        takers=("transformer_blocks", "single_transformer_blocks", "norm_out"),
    ),
)
"""The refiners of the text have an embedding of their own, and one modulation each: they stay as
they are.
"""
