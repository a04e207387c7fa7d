"""Gradients of rows at the sizes of real models: of the norm sites, of query and key, and of
SwiGLU.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..cell import DTYPES, StreamingCell

NSS, SRNSS, SR = (f"{op}_backward" for op in ("norm_scale_shift", "scale_residual_norm_scale_shift", "scale_residual"))
QK = "qk_norm_rope_backward"
BRANCH, SWIGLU = "norm_scale_residual_backward", "swiglu_backward"
OPS = (NSS, SRNSS, SR, QK, BRANCH, SWIGLU)
_STREAMS = {NSS: (2, 1), SRNSS: (3, 2), SR: (1, 1), QK: (4, 2), BRANCH: (2, 1), SWIGLU: (3, 2)}
HEAD = 128


@dataclass(frozen=True)
class GradientCell(StreamingCell):
    """One call, B = 1."""

    op: str
    rows: int
    width: int
    tables: bool = False
    """Of a norm site: whether a float32 table is added to the modulations, as in Wan."""
    across: bool = False
    """Of query and key: one norm across all heads and real rotary tables, as in Wan; else a norm
    per head and complex ones, as in Qwen-Image.
    """
    dtype: str = "bf16"
    diffusers: bool = False
    """Of a norm site: whether the norm is diffusers' RMSNorm, with a weight, as in Z-Image."""

    @property
    def name(self) -> str:
        """A readable identifier, which ``--cells`` matches."""
        short = self.op.replace("norm_scale_shift", "nss").replace("scale_residual_", "sr_")
        flags = [name for name in ("tables", "across", "diffusers") if getattr(self, name)]
        return "/".join([short, f"{self.rows}x{self.width}", self.dtype, *flags])

    @property
    def streams(self) -> tuple[int, int, int]:
        """Reads, writes and bytes of a stream: rows, without the tables of a token's angles."""
        return *_STREAMS[self.op], self.rows * self.width * DTYPES[self.dtype].itemsize // 16 * 16

    def inputs(self, device: str = "cuda") -> dict[str, Any]:
        """Random tensors of the op, by the names of its call."""
        dtype = DTYPES[self.dtype]

        def rows(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        def row() -> torch.Tensor:
            return rows(1, self.rows, self.width)

        if self.op == QK:
            made: dict[str, Any] = {name: row().unflatten(2, (-1, HEAD)) for name in ("d_query", "d_key")}
            weight = rows(self.width if self.across else HEAD)
            made |= {"query": row(), "key": row(), "query_weight": weight, "key_weight": weight}
            if self.across:
                cos, sin = torch.randn(2, 1, self.rows, 1, HEAD // 2, device=device)
                return made | {"cos": cos, "sin": sin}
            return made | {"cos": torch.randn(self.rows, HEAD // 2, dtype=torch.complex64, device=device)}
        if self.op == SWIGLU:
            return {name: row() for name in ("dy", "x", "value")}
        names = {NSS: ("scale", "shift"), SRNSS: ("gate", "scale", "shift"), SR: ("gate",), BRANCH: ("gate",)}[self.op]
        given = {NSS: ("dy", "x"), SRNSS: ("dy", "dr", "r"), SR: ("dr",), BRANCH: ("dr", "x")}[self.op]
        made = {name: row() for name in given}
        if self.diffusers:
            made["x_weight" if self.op == BRANCH else "weight"] = rows(self.width)
        made |= dict(zip(names, rows(1, 1, len(names) * self.width).chunk(len(names), dim=-1), strict=True))
        return made | ({f"{name}_table": torch.randn(self.width, device=device) for name in names} if self.tables else {})

    def options(self, rounding: str) -> dict[str, Any]:
        """What else the op takes."""
        if self.op in (SR, SWIGLU):
            return {"rounding": rounding}
        if self.op == BRANCH:
            return {"eps": 1e-5, "rounding": rounding}
        if self.op == QK:
            norm = "rms" if self.across else "diffusers_rms"
            return {"head_dim": HEAD, "norm": norm, "eps": 1e-6, "pairs": "neighbours", "rounding": rounding}
        return {"norm": "diffusers_rms" if self.diffusers else "layer", "eps": 1e-6, "rounding": rounding}


_SIZES = ((128, 3072), (1024, 3072), (4096, 3072), (27030, 3072))
CELLS = (
    *(GradientCell(op, *size) for op in (NSS, SRNSS, SR) for size in _SIZES),
    *(GradientCell(op, *size, tables=True) for op in (NSS, SRNSS, SR) for size in ((32760, 1536), (75600, 5120))),
    *(GradientCell(QK, *size) for size in _SIZES),
    *(GradientCell(QK, *size, across=True) for size in ((32760, 1536), (75600, 5120))),
    GradientCell(SRNSS, 27030, 3072, dtype="fp32"),
    *(GradientCell(op, *size, diffusers=True) for op in (NSS, BRANCH) for size in ((4128, 3840), (16512, 3840), (4352, 2304))),
    *(GradientCell(SWIGLU, *size) for size in ((128, 3072), (4608, 18432), (4128, 10240))),
)
