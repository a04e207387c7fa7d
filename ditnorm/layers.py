"""Norm layers that take their modulation, for drop-in use in place of ``nn.LayerNorm``,
``nn.RMSNorm`` and diffusers' norms.

Called with ``x`` alone each is the plain norm. Parameters and state-dict keys are those of the norm
that it derives from. Shapes, dtypes, rounding laws and errors of the modulation: see
:mod:`ditnorm.functional`.

A layer runs unfused where others see, or change, what a norm takes and returns, such as a hook:
they see what they would see on the norm, and PyTorch modulates the result.
"""

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .functional import (
    norm_scale_shift,
    norm_scale_shift_and_quantize,
    norm_scale_shift_quantize,
    quantize,
    scale_residual,
    scale_residual_norm_scale_shift,
    scale_residual_norm_scale_shift_and_quantize,
    scale_residual_norm_scale_shift_quantize,
)
from .ops import reference
from .ops.calls import NormScaleShift as _NormCall
from .ops.calls import ScaleResidualNormScaleShift as _ResidualNormCall
from .ops.layout import laid_out_as
from .ops.options import ROUNDINGS
from .ops.quantization import Law, Quantized, Wanted, keep
from .swapping.norm_kinds import norm_kind, unknown_norm
from .swapping.swapped import Swapped, untouched

L = TypeVar("L", bound="_Norm")

_NAMES = {"layer": "a LayerNorm", "rms": "an RMSNorm", "fp32_layer": "an FP32LayerNorm"}


class _Norm(Swapped, nn.Module):
    """What the layers share beside ``weight`` and ``bias`` (Parameters or None)."""

    norm: str = "layer"
    rounding: str = "single"
    normalized_shape: tuple[int, ...]
    eps: Any  # float or None
    elementwise_affine: bool
    weight: Any  # nn.Parameter or None, as bias
    bias: Any

    @classmethod
    def from_norm(cls: type[L], module: nn.Module, rounding: str = "single") -> L:
        """A layer with the Parameters (the same objects), eps and mode of ``module``.

        Args:
            module: ``nn.LayerNorm``, ``nn.RMSNorm``, diffusers' ``FP32LayerNorm`` or, where it
                computes the same, diffusers' ``RMSNorm``: not with a half-precision weight, to
                which it rounds before it multiplies.
            rounding: ``"single"`` or ``"eager"``.

        Raises:
            TypeError: for anything else, subclasses included.
            ValueError: for a norm over more than one dim.
        """
        norm, shape = _kind(module)
        eps: Any = module.eps
        layer = cls._make(norm, shape, eps, rounding)
        for name in ("weight", "bias"):
            layer.register_parameter(name, getattr(module, name, None))
        layer.elementwise_affine = layer.weight is not None
        return layer.train(module.training)

    @classmethod
    def _make(cls: type[L], norm: str, shape: tuple[int, ...], eps: float | None, rounding: str) -> L:
        if norm.removeprefix("fp32_") != cls.norm:
            raise TypeError(f"{cls.__name__}.from_norm: expected {_NAMES[cls.norm]}, got {_NAMES[norm]}")
        layer: Any = cls(shape, eps, False, rounding=rounding)
        layer._set("norm", norm)
        return layer

    def _set(self, name: str, value: str) -> None:
        # The class carries the usual value: a patched module stores nothing on its instance.
        if value != getattr(self, name):
            setattr(self, name, value)

    def _configure(self, rounding: str) -> None:
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape: expected the last dim only, got {list(self.normalized_shape)}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {', '.join(map(repr, ROUNDINGS))}, got {rounding!r}")
        self._set("rounding", rounding)

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether ``upstream`` is the norm that the layer computes."""
        return norm_kind(upstream) == cls.norm

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rounding={self.rounding!r}"


class NormScaleShiftLayer(_Norm):
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
            op = partial(norm_scale_shift_quantize, law=law) if isinstance(law, Law) else partial(_norm_keeping, law=law.law)
        return op(
            x,
            scale,
            shift,
            weight=self.weight,
            bias=self.bias,
            scale_table=scale_table,
            shift_table=shift_table,
            index=index,
            norm=self.norm,
            eps=self.eps,
            rounding=self.rounding,
        )

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
        affine = (self.weight, self.bias)
        call = _NormCall(x, scale, shift, *affine, scale_table, shift_table, index, self.norm, self.eps, self.rounding)
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


class ScaleResidualNormScaleShift(_Norm):
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
            _nothing_modulated(gate, scale, shift, gate_table, scale_table, shift_table, index, law)
            if not self.as_made():
                return super().forward(residual)
            return norm_scale_shift(residual, weight=self.weight, bias=self.bias, norm=self.norm, eps=self.eps, rounding=self.rounding)
        op: Any = scale_residual_norm_scale_shift
        if law is not None:
            quantizing = scale_residual_norm_scale_shift_quantize
            op = partial(quantizing, law=law) if isinstance(law, Law) else partial(_residual_norm_keeping, law=law.law)
        return op(
            residual,
            x,
            gate,
            scale,
            shift,
            weight=self.weight,
            bias=self.bias,
            gate_table=gate_table,
            scale_table=scale_table,
            shift_table=shift_table,
            index=index,
            norm=self.norm,
            eps=self.eps,
            rounding=self.rounding,
        )

    def __call__(self, residual: Tensor, x: Tensor | None = None, *gate_scale_shift: Tensor | None, **modulation: Any) -> Any:
        if x is None:
            _nothing_modulated(*gate_scale_shift, **modulation)
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
        tables = (gate_table, scale_table, shift_table)
        call = _ResidualNormCall(
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
            _nothing_modulated(gate, gate_table, index, law)
            return super().forward(residual)
        if residual.dtype is torch.float64:  # which those casts round
            return self._unfused(residual, x, gate, gate_table=gate_table, index=index)
        r = scale_residual(residual, x, gate, gate_table=gate_table, index=index, rounding=self.rounding)
        r = laid_out_as(residual, r)  # no norm stands between it and the Linears
        if isinstance(law, Law):
            return quantize(r, law), r
        # Upstream casts to float32 and back here: unless the residual is float32, it hands on a
        # copy.
        y = r if r.dtype is torch.float32 else r.clone()
        return y if law is None else keep(y, quantize(y, law.law)), r

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
        tables = (gate_table, None, None)
        call = _ResidualNormCall(residual, x, gate, None, None, None, None, *tables, index, "fp32_layer", 0.0, self.rounding)
        return reference.scale_residual_norm_scale_shift(call, super().__call__)


def _norm_keeping(*rows: Any, **options: Any) -> Tensor:
    return keep(*norm_scale_shift_and_quantize(*rows, **options))


def _residual_norm_keeping(*rows: Any, **options: Any) -> tuple[Tensor, Tensor]:
    y, quantized, r = scale_residual_norm_scale_shift_and_quantize(*rows, **options)
    return keep(y, quantized), r


def _nothing_modulated(*modulation: Any, **named: Any) -> None:
    """Raises ``TypeError`` where a layer that was called without ``x`` has been given what only
    applies with it.
    """
    if any(t is not None for t in (*modulation, *named.values())):
        raise TypeError("x: missing; with a modulation the layer takes residual and x, and residual alone is normed as it is")


def _kind(module: Any) -> tuple[str, tuple[int, ...]]:
    kind = norm_kind(type(module))
    if kind == "diffusers_rms":
        if module.weight is not None and module.weight.dtype is not torch.float32:
            raise TypeError(
                f"from_norm: diffusers' RMSNorm with a {module.weight.dtype} weight rounds before it multiplies; no layer here does"
            )
        return "rms", tuple(module.dim)
    if kind in ("layer", "rms", "fp32_layer"):
        return kind, module.normalized_shape
    name = f"{type(module).__module__}.{type(module).__name__}"
    reason = "" if kind is not None else f" ({unknown_norm(type(module))})"
    raise TypeError(f"from_norm: expected nn.LayerNorm, nn.RMSNorm, or diffusers' FP32LayerNorm or RMSNorm, got {name}{reason}")
