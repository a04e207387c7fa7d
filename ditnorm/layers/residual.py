"""``r = residual + gate * x`` and ``norm(r) * (1 + scale) + shift``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import (
    norm_scale_shift,
    scale_residual_norm_scale_shift,
    scale_residual_norm_scale_shift_and_quantize,
    scale_residual_norm_scale_shift_quantize,
)
from ..ops import calls, reference
from ..ops.quantization import Law, Quantized, Wanted, attach
from ..swapping.swapped import untouched
from ..swapping.torch_private import traced_as
from .base import NormLayer, nothing_modulated, parameter


def _traced_call(self: Any, residual: Tensor, x: Tensor | None = None, *gate_scale_shift: Tensor | None, **modulation: Any) -> Any:
    """A layer's ``__call__``, as Dynamo traces it: past that of ``nn.Module``."""
    if x is None:
        nothing_modulated(*gate_scale_shift, **modulation)
        return nn.Module.__call__(self, residual)
    if untouched(self):
        return self.forward(residual, x, *gate_scale_shift, **modulation)
    return self._unfused(residual, x, *gate_scale_shift, **modulation)


class ScaleResidualNormScaleShift(NormLayer):
    """``r = residual + gate * x`` and ``norm(r) * (1 + scale) + shift`` in one kernel; also an
    ``nn.LayerNorm`` or an ``nn.RMSNorm``, with its parameters and state-dict keys.

    ``forward(residual, x, gate, scale, shift, *, gate_table, scale_table, shift_table, index)``
    takes ``residual`` and ``x`` [B, S, D] or [S, D] and returns ``(y, r)`` of that shape; with
    ``residual`` alone it is the plain norm of it. Modulations, errors:
    :func:`ditnorm.scale_residual_norm_scale_shift`.

    Besides ``norm_type`` it takes what :class:`LayerNormScaleShift` and :class:`RMSNormScaleShift`
    take.

    Args:
        norm_type: ``"layer"`` or ``"rms"``.

    Raises:
        ValueError: for another ``norm_type`` or rounding, or more than one normalized dim.
        TypeError: when called with a modulation and without ``x``.

    Examples:
        >>> norm = ditnorm.ScaleResidualNormScaleShift(64, norm_type="rms")
        >>> residual, x = torch.randn(2, 2, 16, 64).unbind()
        >>> gate, scale = torch.randn(2, 2, 64).unbind()
        >>> y, r = norm(residual, x, gate=gate, scale=scale)
        >>> torch.testing.assert_close(r, residual + gate[:, None] * x)
        >>> torch.testing.assert_close(y, F.rms_norm(r, (64,)) * (1 + scale[:, None]))
    """

    def __new__(cls, *args: Any, norm_type: str = "layer", **kwargs: Any) -> "ScaleResidualNormScaleShift":
        if norm_type not in ("layer", "rms"):
            raise ValueError(f"norm_type: expected 'layer' or 'rms', got {norm_type!r}")
        if cls is ScaleResidualNormScaleShift:
            cls = ScaleResidualLayerNormScaleShift if norm_type == "layer" else ScaleResidualRMSNormScaleShift
        return super().__new__(cls)

    @classmethod
    def _make(cls, norm: str, shape: tuple[int, ...], eps: float | None, rounding: str) -> "ScaleResidualNormScaleShift":
        layer = cls(shape, eps, False, norm_type=norm.removeprefix("fp32_"), rounding=rounding)
        layer._set("norm", norm)
        return layer

    def forward(
        self,
        residual: Tensor,
        x: Tensor | None = None,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        gate_table: Tensor | None = None,
        scale_table: Tensor | None = None,
        shift_table: Tensor | None = None,
        index: Tensor | None = None,
        law: Wanted | None = None,
    ) -> Tensor | tuple[Tensor | Quantized, Tensor]:
        """``(y, r)``, ``y`` quantised by ``law`` if there is one, or the plain norm of ``residual``
        where ``x`` is None.
        """
        if x is None:
            nothing_modulated(gate, scale, shift, gate_table, scale_table, shift_table, index, law)
            if not self.as_made():
                return super().forward(residual)
            return norm_scale_shift(residual, weight=self.weight, bias=self.bias, norm=self.norm, eps=self.eps, rounding=self.rounding)
        op: Any = scale_residual_norm_scale_shift
        if law is not None:
            quantizing = scale_residual_norm_scale_shift_quantize
            op = partial(quantizing, law=law) if isinstance(law, Law) else partial(_residual_norm_with_quantized, law=law.law)
        return op(
            residual,
            x,
            gate,
            scale,
            shift,
            weight=parameter(self, "weight"),
            bias=parameter(self, "bias"),
            gate_table=gate_table,
            scale_table=scale_table,
            shift_table=shift_table,
            index=index,
            norm=self.norm,
            eps=self.eps,
            rounding=self.rounding,
        )

    @traced_as(_traced_call)
    def __call__(self, residual: Tensor, x: Tensor | None = None, *gate_scale_shift: Tensor | None, **modulation: Any) -> Any:
        if x is None:
            nothing_modulated(*gate_scale_shift, **modulation)
            return super().__call__(residual)
        if not untouched(self):
            return self._unfused(residual, x, *gate_scale_shift, **modulation)
        return super().__call__(residual, x, *gate_scale_shift, **modulation)

    def _unfused(
        self,
        residual: Tensor,
        x: Tensor,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        gate_table: Tensor | None = None,
        scale_table: Tensor | None = None,
        shift_table: Tensor | None = None,
        index: Tensor | None = None,
        law: Wanted | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The call where others see what the norm takes and returns, which is never quantised."""
        tables = (gate_table, scale_table, shift_table)
        call = calls.ScaleResidualNormScaleShift(
            residual, x, gate, scale, shift, self.weight, self.bias, *tables, index, self.norm, self.eps, self.rounding
        )
        return reference.scale_residual_norm_scale_shift(call, super().__call__)


class ScaleResidualLayerNormScaleShift(ScaleResidualNormScaleShift, nn.LayerNorm):  # type: ignore[misc]
    """:class:`ScaleResidualNormScaleShift` over a LayerNorm."""

    norm = "layer"

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_type: str = "layer",
        rounding: str = "single",
    ) -> None:
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._configure(rounding)


class ScaleResidualRMSNormScaleShift(ScaleResidualNormScaleShift, nn.RMSNorm):  # type: ignore[misc]
    """:class:`ScaleResidualNormScaleShift` over an RMSNorm."""

    norm = "rms"

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm_type: str = "rms",
        rounding: str = "single",
    ) -> None:
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device, dtype)
        self.register_parameter("bias", None)
        self._configure(rounding)


def _residual_norm_with_quantized(*rows: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """``(y, r)`` of the op, with what ``y`` was quantised to attached to it."""
    y, quantized, r = scale_residual_norm_scale_shift_and_quantize(*rows, **options)
    return attach(y, quantized), r
