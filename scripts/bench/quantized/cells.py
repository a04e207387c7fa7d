"""Activations quantised at the sizes of real models: alone, behind GELU, and behind the norm
sites.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ditnorm.ops.quantization import LAWS, Law

from ..cell import DTYPES, StreamingCell

OPS = ("quantize", "gelu_quantize", "norm_scale_shift_quantize", "scale_residual_norm_scale_shift_quantize")
QUANTIZE, GELU, NSS, SRNSS = OPS
_READS = {QUANTIZE: 1, GELU: 1, NSS: 1, SRNSS: 2}
_WRITES = {QUANTIZE: 0, GELU: 0, NSS: 0, SRNSS: 1}  # of rows in the dtype of x


@dataclass(frozen=True)
class QuantizedCell(StreamingCell):
    """One call, B = 1."""

    op: str
    rows: int
    width: int
    law: str = "float8-row"
    tables: bool = False
    """Whether a float32 table is added to the modulations, as in Wan."""
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """A readable identifier, which ``--cells`` matches."""
        parts = [
            self.op.replace("norm_scale_shift", "nss").replace("scale_residual_", "sr"),
            f"{self.rows}x{self.width}",
            self.law,
            self.dtype,
        ]
        return "/".join([*parts, *(["tables"] if self.tables else [])])

    @property
    def quantiser(self) -> Law:
        return next(law for law in LAWS if str(law) == self.law)

    @property
    def streams(self) -> tuple[int, int, int]:
        """Reads, writes and bytes of a stream: one of the quantised rows, two of the others. A law
        with one scale reads twice.
        """
        width = DTYPES[self.dtype].itemsize
        passes = 1 if self.quantiser.per_row else 2
        return passes * width * _READS[self.op], 1 + width * _WRITES[self.op], self.rows * self.width // 16 * 16

    def inputs(self, device: str = "cuda") -> dict[str, Any]:
        """Random arguments of the op."""
        dtype = DTYPES[self.dtype]

        def rows(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        made: dict[str, Any] = {"x": rows(1, self.rows, self.width)}
        names = {NSS: ("scale", "shift"), SRNSS: ("gate", "scale", "shift")}.get(self.op, ())
        if self.op == SRNSS:
            made["residual"] = rows(1, self.rows, self.width)
        if names:
            made |= dict(zip(names, rows(1, 1, len(names) * self.width).chunk(len(names), dim=-1), strict=True))
        return made | ({f"{name}_table": torch.randn(self.width, device=device) for name in names} if self.tables else {})


CELLS = (
    *(QuantizedCell(QUANTIZE, *size) for size in ((128, 3072), (1024, 3072), (4096, 3072), (27030, 3072), (32760, 1536), (75600, 5120))),
    *(QuantizedCell(GELU, *size) for size in ((4096, 12288), (27030, 12288), (32760, 8960))),
    *(QuantizedCell(NSS, *size) for size in ((128, 3072), (1024, 3072), (4096, 3072), (27030, 3072))),
    *(QuantizedCell(SRNSS, *size) for size in ((128, 3072), (1024, 3072), (4096, 3072), (27030, 3072))),
    *(QuantizedCell(op, *size, tables=True) for op in (NSS, SRNSS) for size in ((32760, 1536), (27280, 3072), (75600, 5120))),
    *(QuantizedCell(op, 27030, 3072, "int8-row") for op in (QUANTIZE, NSS, SRNSS)),
    QuantizedCell(GELU, 27030, 12288, "int8-row"),
    *(QuantizedCell(QUANTIZE, rows, 3072, "float8-tensor") for rows in (1, 64)),
    *(QuantizedCell(op, *size, "float8-tensor") for op in (QUANTIZE, NSS) for size in ((128, 3072), (4096, 3072), (27030, 3072))),
    *(QuantizedCell(GELU, rows, 12288, "float8-tensor") for rows in (128, 4096, 27030)),
    QuantizedCell(QUANTIZE, 27030, 3072, "float8-row-bfl"),
    QuantizedCell(QUANTIZE, 27030, 3072, dtype="fp16"),
)
