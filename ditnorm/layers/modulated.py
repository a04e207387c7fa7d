"""``norm(x) * (1 + scale) + shift``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import norm_scale_shift, norm_scale_shift_and_quantize, norm_scale_shift_quantize
from ..ops import calls, reference
from ..ops.quantization import Law, Wanted, attach
from ..swapping.swapped import untouched
from ..swapping.torch_private import traced_as
from .base import NormLayer, parameter


def _traced_call(self: Any, x: Tensor, *scale_shift: Tensor | None, **modulation: Any) -> Any:
    """A layer's ``__call__``, as Dynamo traces it: past that of ``nn.Module``."""
    if untouched(self):
        return self.forward(x, *scale_shift, **modulation)
    if scale_shift or modulation:
        return self._unfused(x, *scale_shift, **modulation)
    return nn.Module.__call__(self, x)


class NormScaleShiftLayer(NormLayer):
    """What the layers of ``norm(x) * (1 + scale) + shift`` share, whichever norm it is."""

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        scale_table: Tensor | None = None,
        shift_table: Tensor | None = None,
        index: Tensor | None = None,
        law: Wanted | None = None,
    ) -> Any:
        """``norm(x) * (1 + scale) + shift``: ``x`` [B, S, D] or [S, D] -> the same shape and dtype,
        or that quantised by ``law``.
        """
        if scale is None and shift is None and not self.as_made():
            return super().forward(x)
        op: Any = norm_scale_shift
        if law is not None:
            op = partial(norm_scale_shift_quantize, law=law) if isinstance(law, Law) else partial(_norm_with_quantized, law=law.law)
        return op(
            x,
            scale,
            shift,
            weight=parameter(self, "weight"),
            bias=parameter(self, "bias"),
            scale_table=scale_table,
            shift_table=shift_table,
            index=index,
            norm=self.norm,
            eps=self.eps,
            rounding=self.rounding,
        )

    @traced_as(_traced_call)
    def __call__(self, x: Tensor, *scale_shift: Tensor | None, **modulation: Any) -> Any:
        if (scale_shift or modulation) and not untouched(self):
            return self._unfused(x, *scale_shift, **modulation)
        return super().__call__(x, *scale_shift, **modulation)

    def _unfused(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        scale_table: Tensor | None = None,
        shift_table: Tensor | None = None,
        index: Tensor | None = None,
        law: Wanted | None = None,
    ) -> Tensor:
        """The call where others see what the norm takes and returns, which is never quantised."""
        affine = (self.weight, self.bias)
        call = calls.NormScaleShift(x, scale, shift, *affine, scale_table, shift_table, index, self.norm, self.eps, self.rounding)
        return reference.norm_scale_shift(call, super().__call__)


class LayerNormScaleShift(NormScaleShiftLayer, nn.LayerNorm):
    """``LayerNorm(x) * (1 + scale) + shift`` (adaLN, arXiv:2212.09748) in one kernel; an
    ``nn.LayerNorm`` with the same parameters and state-dict keys.

    ``forward(x, scale, shift, *, scale_table, shift_table, index)`` takes ``x`` [B, S, D] or [S, D]
    and returns its shape and dtype; with ``x`` alone it is the plain norm. Modulations, errors:
    :func:`ditnorm.norm_scale_shift`.

    Args:
        normalized_shape: the last dim, D.
        eps: of the norm.
        elementwise_affine: whether there is a weight [D], and a bias.
        bias: whether there is a bias [D] beside the weight.
        device: of the parameters.
        dtype: of the parameters.
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Raises:
        ValueError: for more than one normalized dim, or another rounding.

    Examples:
        >>> norm = ditnorm.LayerNormScaleShift(64, elementwise_affine=False, rounding="eager")
        >>> x, scale, shift = torch.randn(2, 16, 64), torch.randn(2, 64), torch.randn(2, 64)
        >>> y = norm(x, scale=scale, shift=shift)
        >>> torch.equal(y, F.layer_norm(x, (64,)) * (1 + scale[:, None]) + shift[:, None])
        True
    """

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
        rounding: str = "single",
    ) -> None:
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._configure(rounding)


class RMSNormScaleShift(NormScaleShiftLayer, nn.RMSNorm):
    """``RMSNorm(x) * (1 + scale) + shift`` (arXiv:1910.07467) in one kernel; an ``nn.RMSNorm`` with
    the same parameter and state-dict key.

    ``forward(x, scale, shift, *, scale_table, shift_table, index)`` takes ``x`` [B, S, D] or [S, D]
    and returns its shape and dtype; with ``x`` alone it is the plain norm. Modulations, errors:
    :func:`ditnorm.norm_scale_shift`.

    Args:
        normalized_shape: the last dim, D.
        eps: of the norm; None: the resolution of float32.
        elementwise_affine: whether there is a weight [D].
        device: of the weight.
        dtype: of the weight.
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Raises:
        ValueError: for more than one normalized dim, or another rounding.

    Examples:
        >>> norm = ditnorm.RMSNormScaleShift.from_norm(torch.nn.RMSNorm(64))
        >>> x, scale = torch.randn(2, 16, 64), torch.randn(2, 64)
        >>> y = norm(x, scale=scale)
        >>> torch.testing.assert_close(y, F.rms_norm(x, (64,)) * (1 + scale[:, None]))
    """

    norm = "rms"

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rounding: str = "single",
    ) -> None:
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device, dtype)
        self.register_parameter("bias", None)
        self._configure(rounding)


def _norm_with_quantized(*rows: Any, **options: Any) -> Tensor:
    """The op's result, with what it was quantised to attached."""
    return attach(*norm_scale_shift_and_quantize(*rows, **options))
