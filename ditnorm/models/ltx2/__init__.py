"""LTX-2, 2.3 and 2.5: a stream of video and one of audio, each in the other's attention."""

from .attention import LTX2Attention
from .blocks import LTX2VideoTransformerBlock, LTX2VideoTransformerBlockOf037

__all__ = ["NOTHING_TO_GAIN", "LTX2Attention", "LTX2VideoTransformerBlock", "LTX2VideoTransformerBlockOf037"]

NOTHING_TO_GAIN = {"LTX2VideoTransformer3DModel": "its blocks add tables to modulations that all share"}
