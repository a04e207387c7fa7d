"""What bench_sandwich.py measures: norm sites of diffusers' RMSNorm, of the stream and of what is
added to it, at the sizes of real models.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..cell import DTYPES, StreamingCell

OPS = ("norm_scale_shift", "scale_residual_norm_scale_shift", "norm_scale_residual", "norm_scale_residual_norm_scale_shift")
NSS, SRNSS, NSR, NSRNSS = OPS
_VECTORS = {
    NSS: ("weight", "scale"),
    SRNSS: ("weight", "gate", "scale", "shift"),
    NSR: ("x_weight", "gate"),
    NSRNSS: ("x_weight", "weight", "gate", "scale"),
}


@dataclass(frozen=True)
class SandwichCell(StreamingCell):
    """One call, B = 1, modulated per sample by views of one tensor."""

    autotune = True

    model: str
    op: str
    rows: int
    width: int
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """A readable identifier, which ``--cells`` matches."""
        return f"{self.model}, {self.op}/{self.rows}x{self.width}/{self.dtype}"

    @property
    def streams(self) -> tuple[int, int, int]:
        """Reads, writes and bytes of a stream: the rows."""
        reads, writes = {NSS: (1, 1), SRNSS: (2, 2), NSR: (2, 1), NSRNSS: (2, 2)}[self.op]
        return reads, writes, self.rows * self.width * DTYPES[self.dtype].itemsize

    def inputs(self, device: str = "cuda") -> dict[str, Any]:
        """Random arguments of the op."""
        dtype = DTYPES[self.dtype]

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        made: dict[str, Any] = {name: random(1, self.rows, self.width) for name in (("x",) if self.op == NSS else ("residual", "x"))}
        modulations = dict(zip(("scale", "gate", "shift"), random(1, 1, 3 * self.width).chunk(3, dim=-1), strict=True))
        return made | {name: modulations[name] if name in modulations else random(self.width) for name in _VECTORS[self.op]}


CELLS = (
    *(SandwichCell("Z-Image 1024x1024", op, 4224, 3840) for op in (NSS, NSRNSS, NSR)),
    *(SandwichCell("Lumina2 1024x1024", op, 4224, 2304) for op in (NSS, NSRNSS, NSR)),
    *(SandwichCell("LTX-2 768x512x121", op, 6144, 4096) for op in (NSS, SRNSS)),
    SandwichCell("Z-Image 2048x2048", NSRNSS, 16512, 3840),
    *(SandwichCell("128 rows", op, 128, 3840) for op in (NSS, NSRNSS, NSR)),
    *(SandwichCell("fp16", op, 4224, 3840, "fp16") for op in (NSS, NSRNSS)),
    *(SandwichCell("fp32", op, 4224, 3840, "fp32") for op in (NSS, NSRNSS)),
)
