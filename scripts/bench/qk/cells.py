"""What bench_qk.py measures: query and key of an attention, normed and rotated, at the sizes of
real models and around them.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..cell import DTYPES


@dataclass(frozen=True)
class QKCell:
    """One call, B = 1."""

    name: str
    tokens: int
    heads: int
    head_dim: int = 128
    encoder: int = 0
    """Tokens of a second stream, with which query, key and value are joined; 0: query and key
    alone.
    """
    rotary: str | None = "complex"
    """The form of the rotary tables: complex, per_element (each value twice), per_pair (every
    second value of such a table), halves (which are turned against each other; a table for each
    head).
    """
    rotated: int | None = None
    """How many tokens are rotated, where not all are."""
    across: bool = False
    """Whether one norm goes across all heads."""
    dtype: str = "bf16"
    flux: bool = False
    """Whether heads have torch's RMSNorm, and the encoder's tokens are rotated, too."""

    @property
    def op(self) -> str:
        return "joint_qk_norm_rope" if self.encoder else "qk_norm_rope"

    @property
    def compiled(self) -> bool:
        return True

    @property
    def autotune(self) -> bool:
        return True

    @property
    def halves(self) -> bool:
        """Whether the halves of a head are turned against each other."""
        return self.rotary == "halves"

    @property
    def norm(self) -> str:
        return "rms" if self.across or self.flux else "diffusers_rms"

    @property
    def encoder_rotary(self) -> str | None:
        """As ``rotary``, for the second stream."""
        return self.rotary if self.flux or self.rotary == "complex" else None

    @property
    def row_bytes(self) -> int:
        """Of all rows that are read; as many are written."""
        rows = 3 * (self.tokens + self.encoder) if self.encoder else 2 * self.tokens
        return rows * self.heads * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def streams(self) -> tuple[int, int, int]:
        """Reads, writes and bytes of a stream: the rows without the rotary tables, which a call
        reads besides.
        """
        return 2, 2, self.row_bytes // 2 // 16 * 16

    @property
    def bytes(self) -> int:
        """Bytes that a call has to move: rows and tables."""
        rotated = 0 if self.rotary is None else (self.tokens if self.rotated is None else self.rotated)
        if self.encoder_rotary is not None:
            rotated += self.encoder
        if self.halves:
            return 2 * self.row_bytes + rotated * self.heads * self.head_dim * 4
        # Wan's tables hold each value twice, and lines are read whole.
        return 2 * self.row_bytes + rotated * self.head_dim * 4 * (1 if self.rotary == "complex" else 2)

    def inputs(self, device: str = "cuda") -> dict[str, Any]:
        """Random arguments of ``qk_norm_rope`` or, with an encoder, ``joint_qk_norm_rope``."""
        dtype, width = DTYPES[self.dtype], self.heads * self.head_dim

        def stream(prefix: str, tokens: int, rotary: Any) -> dict[str, Any]:
            names = ("query", "key", "value") if self.encoder else ("query", "key")
            made: dict[str, Any] = {f"{prefix}{name}": torch.randn(1, tokens, width, dtype=dtype, device=device) for name in names}
            weight = width if self.across else self.head_dim
            made |= {f"{prefix}{name}_weight": 1 + 0.3 * torch.randn(weight, device=device).to(dtype) for name in ("query", "key")}
            return made | {f"{prefix}rotary": rotary}

        made = stream("", self.tokens, self._tables(self.tokens if self.rotated is None else self.rotated, device))
        if self.encoder:
            made |= stream("encoder_", self.encoder, self._tables(self.encoder, device) if self.encoder_rotary is not None else None)
        return made

    def _tables(self, tokens: int, device: str) -> Any:
        if self.rotary is None:
            return None
        if self.halves:
            angles = torch.randn(1, tokens, self.heads, self.head_dim // 2, device=device)
            return angles.cos(), angles.sin()
        angles = torch.randn(tokens, self.head_dim // 2, device=device)
        if self.rotary == "complex":
            return torch.polar(torch.ones_like(angles), angles)
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (angles.cos(), angles.sin()))
        if self.rotary == "per_element":
            return cos, sin
        return cos[None, :, None, 0::2], sin[None, :, None, 1::2]


CELLS = (
    QKCell("Qwen-Image 1024x1024, joint", 4096, 24, encoder=128),
    QKCell("Qwen-Image 512x512, joint", 1024, 24, encoder=128),
    QKCell("FLUX.1 1024x1024, joint", 4096, 24, encoder=512, rotary="per_element", flux=True),
    QKCell("FLUX.1 1024x1024, single", 4608, 24, rotary="per_element", flux=True),
    QKCell("HunyuanVideo 848x480x65, dual", 27030, 24, encoder=256, rotary="per_element"),
    QKCell("HunyuanVideo 848x480x65, single", 27286, 24, rotary="per_element", rotated=27030),
    QKCell("Wan2.1-1.3B 480p, self", 32760, 12, rotary="per_pair", across=True),
    QKCell("Wan2.2-TI2V-5B 704p, self", 27280, 24, rotary="per_pair", across=True),
    QKCell("Wan2.2-A14B 720p, self", 75600, 40, rotary="per_pair", across=True),
    QKCell("LTX-2 768x512x121, video", 6144, 32, rotary="halves", across=True),
    QKCell("LTX-2 768x512x121, video to audio", 6144, 32, 64, rotary="halves", across=True),
    QKCell("128 tokens", 128, 24),
    QKCell("1024 tokens", 1024, 24),
    QKCell("heads of 64", 27030, 48, 64),
    QKCell("heads of 96", 27030, 32, 96),
    QKCell("heads of 256", 27030, 12, 256),
    QKCell("heads of 40", 27030, 75, 40),
    QKCell("fp16", 27030, 24, dtype="fp16"),
    QKCell("fp32", 27030, 24, dtype="fp32"),
    QKCell("fp32, torch's norm", 4608, 24, rotary="per_element", dtype="fp32", flux=True),
    QKCell("across heads, fp32", 32760, 12, rotary="per_pair", across=True, dtype="fp32"),
    QKCell("norm alone", 27030, 24, rotary=None),
)
