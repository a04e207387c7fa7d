"""What bench_activation.py measures: the activations of feed-forward layers and single-stream
blocks, at the sizes of real models.
"""

from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

import torch

from ..cell import DTYPES, StreamingCell


@dataclass(frozen=True)
class ActivationCell(StreamingCell):
    """One call, B = 1. All that it reads is a view of one projection, but for what attention
    returned.
    """

    autotune = True

    name: str
    op: str
    tokens: int
    width: int
    beside: int = 0
    """Width of what stands beside it."""
    dtype: str = "bf16"

    @property
    def streams(self) -> tuple[int, int, int]:
        """Reads, writes and bytes of a stream, which is the common divisor of the widths."""
        stream = reduce(gcd, (self.width, self.beside), 0)
        reads, writes = self.beside + self.width * (2 if self.op == "swiglu" else 1), self.beside + self.width
        if reads == writes:  # a plain copy, as wide as it comes
            stream = writes
        return reads // stream, writes // stream, self.tokens * stream * DTYPES[self.dtype].itemsize // 16 * 16

    def inputs(self, device: str = "cuda") -> dict[str, Any]:
        """Random arguments of the op."""
        dtype, gated = DTYPES[self.dtype], self.op == "swiglu"
        projected = (2 * torch.randn(1, self.tokens, self.width * (2 if gated else 1), device=device)).to(dtype)
        made = dict(zip(("x", "value"), projected.split(self.width, dim=-1), strict=False))
        return made | ({"beside": torch.randn(1, self.tokens, self.beside, device=device).to(dtype)} if self.beside else {})


CELLS = (
    ActivationCell("FLUX.1 1024x1024, single block", "gelu", 4608, 12288, 3072),
    ActivationCell("FLUX.1 512x512, single block", "gelu", 1536, 12288, 3072),
    ActivationCell("HunyuanVideo 848x480x65, single block", "gelu", 27286, 12288, 3072),
    ActivationCell("FLUX.2 1024x1024, single block", "swiglu", 4608, 18432, 6144),
    ActivationCell("FLUX.2 1024x1024, feed-forward", "swiglu", 4096, 18432),
    ActivationCell("Klein 4B 1024x1024, single block", "swiglu", 4608, 9216, 3072),
    ActivationCell("Z-Image 1024x1024, feed-forward", "swiglu", 4128, 10240),
    ActivationCell("Lumina2 1024x1024, feed-forward", "swiglu", 4352, 9216),
    ActivationCell("128 tokens, gelu", "gelu", 128, 12288, 3072),
    ActivationCell("128 tokens, swiglu", "swiglu", 128, 10240),
    ActivationCell("gelu, fp16", "gelu", 4608, 12288, 3072, dtype="fp16"),
    ActivationCell("swiglu, fp16", "swiglu", 4608, 10240, dtype="fp16"),
    ActivationCell("gelu, fp32", "gelu", 4608, 12288, 3072, dtype="fp32"),
    ActivationCell("swiglu, fp32", "swiglu", 4608, 10240, dtype="fp32"),
    ActivationCell("gelu alone", "gelu", 27030, 12288),
)
