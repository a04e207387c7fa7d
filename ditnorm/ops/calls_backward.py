"""The arguments of the ops that make gradients, as in :mod:`ditnorm.ops.calls`. The gradients of
sums over rows (modulations, weights) are made elsewhere (:mod:`ditnorm.ops.gradients`).
"""

from typing import Any, NamedTuple

from torch import Tensor

from .calls import JointQKNormRope, NormScaleResidual, NormScaleShift, QKNormRope, ScaleResidual, ScaleResidualNormScaleShift, SwiGLU
from .options import Norm, Pairs, QKNorm, Rounding


class NormScaleShiftBackward(NamedTuple):
    """The gradient of ``x`` of :class:`NormScaleShift`, given ``dy``, that of its result. ``dr``,
    what else comes back to ``x``, is added.
    """

    dy: Tensor
    dr: Tensor | None
    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    norm: Norm
    eps: float
    rounding: Rounding

    @property
    def site(self) -> NormScaleShift:
        """The call whose gradient it is."""
        arguments: tuple[Any, ...] = (*self[2:6], None, *self[6:])
        return NormScaleShift(*arguments)


class NormScaleShiftBackwardParts(NamedTuple):
    """Under ``"eager"`` the gradients that come through the two uses of ``x`` in diffusers'
    ``RMSNorm`` of :class:`NormScaleShift`.
    """

    dy: Tensor
    x: Tensor
    scale: Tensor | None
    weight: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    eps: float

    @property
    def site(self) -> NormScaleShift:
        """The call whose gradients they are."""
        affine_and_tables = (self.weight, None, None, None)
        return NormScaleShift(self.x, self.scale, None, *affine_and_tables, self.index, "diffusers_rms", self.eps, "eager")


class ScaleResidualNormScaleShiftBackward(NamedTuple):
    """The gradients of ``residual`` and ``x`` of :class:`ScaleResidualNormScaleShift` with a gate,
    given those of its results, and its result ``r``.
    """

    dy: Tensor
    dr: Tensor | None
    r: Tensor
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    gate_table: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    norm: Norm
    eps: float
    rounding: Rounding

    @property
    def site(self) -> ScaleResidualNormScaleShift:
        """The call whose gradients they are, ``r`` in the places of ``residual`` and ``x``."""
        arguments: tuple[Any, ...] = (self.r, self.r, *self[3:7], None, *self[7:])
        return ScaleResidualNormScaleShift(*arguments)


class ScaleResidualBackward(NamedTuple):
    """The gradient of ``x`` of :class:`ScaleResidual`, which had a gate."""

    dr: Tensor
    gate: Tensor | None
    gate_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    rounding: Rounding

    @property
    def site(self) -> ScaleResidual:
        """The call whose gradient it is, ``dr`` in the places of ``residual`` and ``x``."""
        return ScaleResidual(self.dr, *self)


class NormScaleResidualBackward(NamedTuple):
    """The gradient of ``x`` of :class:`NormScaleResidual`."""

    dr: Tensor
    x: Tensor
    x_weight: Tensor | None
    gate: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    eps: float
    rounding: Rounding

    @property
    def forward(self) -> NormScaleResidual:
        """The call whose gradient it is, ``x`` in the place of ``residual``."""
        return NormScaleResidual(self.x, *self[1:])

    @property
    def site(self) -> ScaleResidual:
        """What followed the norm of ``x``."""
        return self.forward.site


class SwiGLUBackward(NamedTuple):
    """The gradients of ``x`` and ``value`` of :class:`SwiGLU`, given that of their product."""

    dy: Tensor
    x: Tensor
    value: Tensor
    rounding: Rounding

    @property
    def forward(self) -> SwiGLU:
        """The call whose gradients they are."""
        return SwiGLU(self.x, self.value, None, self.rounding)


class QKNormRopeBackward(NamedTuple):
    """The gradients of query and key of :class:`QKNormRope`."""

    d_query: Tensor
    d_key: Tensor
    query: Tensor
    key: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    key_cos: Tensor | None
    key_sin: Tensor | None
    head_dim: int
    norm: QKNorm
    eps: float
    pairs: Pairs
    rounding: Rounding

    @property
    def forward(self) -> QKNormRope:
        """The call whose gradients they are."""
        return QKNormRope(*self[2:])


class JointQKNormRopeBackward(NamedTuple):
    """The gradients of both streams' query and key of :class:`JointQKNormRope`."""

    d_query: Tensor
    d_key: Tensor
    query: Tensor
    key: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    encoder_query: Tensor
    encoder_key: Tensor
    encoder_query_weight: Tensor | None
    encoder_key_weight: Tensor | None
    encoder_cos: Tensor | None
    encoder_sin: Tensor | None
    head_dim: int
    norm: QKNorm
    eps: float
    encoder_first: bool
    rounding: Rounding

    @property
    def forward(self) -> JointQKNormRope:
        """The call whose gradients they are, the keys in the places of the values."""
        arguments: tuple[Any, ...] = (*self[2:4], self.key, *self[4:10], self.encoder_key, *self[10:])
        return JointQKNormRope(*arguments)
