"""``r = residual + gate * x``, where a block has no norm."""

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import quantize, scale_residual
from ..ops import calls, reference
from ..ops.layout import laid_out_as
from ..ops.quantization import Law, Quantized, Wanted, attach
from ..swapping.norm_kinds import norm_kind
from ..swapping.swapped import Swapped, untouched
from .base import nothing_modulated


class ScaleResidualIdentity(Swapped, nn.Identity):
    """The residual alone, where a block has ``nn.Identity`` for its norm (Wan without
    ``cross_attn_norm``): ``(r, r)``.
    """

    rounding = "single"

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether ``upstream`` computes nothing."""
        return norm_kind(upstream) == "identity"

    def forward(  # type: ignore[override]
        self,
        residual: Tensor,
        x: Tensor | None = None,
        gate: Tensor | None = None,
        *,
        gate_table: Tensor | None = None,
        index: Tensor | None = None,
        law: Wanted | None = None,
    ) -> Tensor | tuple[Tensor | Quantized, Tensor]:
        """``(r, r)`` with ``r = residual + gate * x``, or ``residual`` itself where ``x`` is None.

        The first is a copy in half precision, or quantised by ``law``.
        """
        if x is None:
            nothing_modulated(gate, gate_table, index, law)
            return super().forward(residual)
        if residual.dtype is torch.float64:  # which upstream rounds, see below
            return self._unfused(residual, x, gate, gate_table=gate_table, index=index)
        r = scale_residual(residual, x, gate, gate_table=gate_table, index=index, rounding=self.rounding)
        r = laid_out_as(residual, r)  # no norm stands between it and the Linears
        if isinstance(law, Law):
            return quantize(r, law), r
        # Upstream casts to float32 and back here. So what it hands on is a copy, unless the
        # residual is float32.
        y = r if r.dtype is torch.float32 else r.clone()
        return y if law is None else attach(y, quantize(y, law.law)), r

    def __call__(self, residual: Tensor, x: Tensor | None = None, *gate: Tensor | None, **modulation: Any) -> Any:
        if x is not None and not untouched(self):
            return self._unfused(residual, x, *gate, **modulation)
        return super().__call__(residual, x, *gate, **modulation)

    def _unfused(
        self,
        residual: Tensor,
        x: Tensor,
        gate: Tensor | None = None,
        *,
        gate_table: Tensor | None = None,
        index: Tensor | None = None,
        law: Wanted | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The call where others see what the norm takes and returns, which is never quantised."""
        modulation, affine, tables = (gate, None, None), (None, None), (gate_table, None, None)
        call = calls.ScaleResidualNormScaleShift(
            residual, x, *modulation, *affine, *tables, index, norm="fp32_layer", eps=0.0, rounding=self.rounding
        )
        return reference.scale_residual_norm_scale_shift(call, super().__call__)
