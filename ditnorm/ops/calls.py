"""The arguments of each op as one structure: everything else that has to name them takes the
structure.

The fields are the op's arguments in the order of its schema, tensors first. What users write as a
name ("layer", "eager") or a value an op takes as a number, its place in ``NORMS``, ``QK_NORMS``,
``ROUNDINGS``, ``LAWS`` or ``HALVES``; those of the C++ side are the same.
"""

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .quantization import LAWS, Law

NORMS = ("layer", "rms", "fp32_layer", "diffusers_rms")
QK_NORMS = ("rms", "diffusers_rms")
PAIRS = ("neighbours", "halves", "halves, rounded")
"""Which elements of a head a rotary embedding turns against each other: ``j`` and ``j + 1``, or
``j`` and ``j + d / 2``. The last is the second as CUDA computes it with older releases of PyTorch.
"""
HALVES_OF_CUDA = PAIRS[1 if torch.__version__ >= (2, 11) else 2]  # type: ignore[operator]
"""Up to PyTorch 2.10 ``addcmul_`` rounds the product on CUDA before it adds it (read off the
machine code of 2.10 and 2.11 for compute capability 9.0).
"""
ROUNDINGS = ("single", "eager")

HALVES = (torch.float16, torch.bfloat16)

Norm = Annotated[str, NORMS]
QKNorm = Annotated[str, QK_NORMS]
Pairs = Annotated[str, PAIRS]
Rounding = Annotated[str, ROUNDINGS]
Quantiser = Annotated[Law, LAWS]
Half = Annotated[torch.dtype, HALVES]


class NormScaleShift(NamedTuple):
    """``y = norm(x) * (1 + scale) + shift``."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    norm: Norm
    eps: float
    rounding: Rounding


class ScaleResidualNormScaleShift(NamedTuple):
    """``r = residual + gate * x``, ``y = norm(r) * (1 + scale) + shift``."""

    residual: Tensor
    x: Tensor
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate_table: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    norm: Norm
    eps: float
    rounding: Rounding


class ScaleResidual(NamedTuple):
    """``r = residual + gate * x``."""

    residual: Tensor
    x: Tensor
    gate: Tensor | None
    gate_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    rounding: Rounding


class NormScaleResidual(NamedTuple):
    """``r = residual + gate * norm(x)``, of diffusers' RMSNorm."""

    residual: Tensor
    x: Tensor
    x_weight: Tensor | None
    gate: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    eps: float
    rounding: Rounding

    @property
    def site(self) -> ScaleResidual:
        """What follows the norm of ``x``."""
        return ScaleResidual(self.residual, self.x, self.gate, None, self.index, self.rounding)


class NormScaleResidualNormScaleShift(NamedTuple):
    """``r = residual + gate * norm(x)``, ``y = norm(r) * (1 + scale) + shift``, of diffusers'
    RMSNorm.
    """

    residual: Tensor
    x: Tensor
    x_weight: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    eps: float
    rounding: Rounding

    @property
    def site(self) -> ScaleResidualNormScaleShift:
        """What follows the norm of ``x``."""
        modulated = (self.residual, self.x, self.gate, self.scale, self.shift, self.weight)
        return ScaleResidualNormScaleShift(*modulated, None, None, None, None, self.index, "diffusers_rms", self.eps, self.rounding)


class QKNormRope(NamedTuple):
    """Query and key, normed and rotated. A rotary table that is complex stands in ``cos``, without
    ``sin``; the key is rotated by the query's tables where it has none of its own.
    """

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
    def key_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Those that the key is rotated by."""
        return (self.cos, self.sin) if self.key_cos is None else (self.key_cos, self.key_sin)


class JointQKNormRope(NamedTuple):
    """Query, key and value of two streams, normed, rotated and joined."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    encoder_query: Tensor
    encoder_key: Tensor
    encoder_value: Tensor
    encoder_query_weight: Tensor | None
    encoder_key_weight: Tensor | None
    encoder_cos: Tensor | None
    encoder_sin: Tensor | None
    head_dim: int
    norm: QKNorm
    eps: float
    encoder_first: bool
    rounding: Rounding


class Quantize(NamedTuple):
    """``x`` [..., D] quantised."""

    x: Tensor
    law: Quantiser


class Gelu(NamedTuple):
    """GELU of ``x``, written behind ``beside``."""

    x: Tensor
    beside: Tensor | None
    rounding: Rounding


class SwiGLU(NamedTuple):
    """``silu(x) * value``, written behind ``beside``."""

    x: Tensor
    value: Tensor
    beside: Tensor | None
    rounding: Rounding


class GeluQuantize(NamedTuple):
    """:class:`Gelu`, quantised."""

    x: Tensor
    beside: Tensor | None
    law: Quantiser

    @property
    def activation(self) -> Gelu:
        """What is quantised. (It has one law of rounding.)"""
        return Gelu(self.x, self.beside, "eager")


class SwiGLUQuantize(NamedTuple):
    """:class:`SwiGLU`, quantised."""

    x: Tensor
    value: Tensor
    beside: Tensor | None
    rounding: Rounding
    law: Quantiser

    @property
    def activation(self) -> SwiGLU:
        """What is quantised."""
        return SwiGLU(*self[:-1])


class DequantizeProduct(NamedTuple):
    """What an int8 matrix product [rows, N] stands for: ``product * scale * weight_scale +
    bias``.
    """

    product: Tensor
    scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    dtype: Half


class NormScaleShiftBackward(NamedTuple):
    """The gradient of ``x`` of :class:`NormScaleShift`: what comes back through ``y``, and ``dr``,
    which comes from elsewhere.
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
    """The gradients of ``residual`` and ``x`` of :class:`ScaleResidualNormScaleShift`, which had a
    gate: of its results ``r`` is kept.
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


class NormScaleShiftQuantize(NamedTuple):
    """:class:`NormScaleShift`, quantised."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    norm: Norm
    eps: float
    rounding: Rounding
    law: Quantiser

    @property
    def site(self) -> NormScaleShift:
        """What is quantised."""
        return NormScaleShift(*self[:-1])


class ScaleResidualNormScaleShiftQuantize(NamedTuple):
    """:class:`ScaleResidualNormScaleShift`, its ``y`` quantised."""

    residual: Tensor
    x: Tensor
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate_table: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    norm: Norm
    eps: float
    rounding: Rounding
    law: Quantiser

    @property
    def site(self) -> ScaleResidualNormScaleShift:
        """What is quantised."""
        return ScaleResidualNormScaleShift(*self[:-1])


def default_eps(norm: str, x: Tensor) -> float:
    """What torch's function takes where nothing is said: ``layer_norm`` 1e-5, ``rms_norm`` what its
    arithmetic resolves.
    """
    if norm != "rms":
        return 1e-5
    return torch.finfo(torch.float64 if x.dtype is torch.float64 else torch.float32).eps


SandwichCall = NormScaleResidual | NormScaleResidualNormScaleShift
"""A call at a site whose branch is normed before it is added."""
QuantizedSiteCall = NormScaleShiftQuantize | ScaleResidualNormScaleShiftQuantize
SiteCall = NormScaleShift | ScaleResidualNormScaleShift | ScaleResidual
"""A call at a norm site of a block."""
QKCall = QKNormRope | JointQKNormRope
ActivationCall = Gelu | SwiGLU
QuantizedActivationCall = GeluQuantize | SwiGLUQuantize

Modulation = tuple[Tensor | None, Tensor | None]
"""A modulation and the table that is added to it in float32; either may be missing (a table alone
is an error).
"""


def modulations(call: SiteCall) -> dict[str, Modulation]:
    """The modulations that the op takes, by name."""
    names = (
        ("scale", "shift")
        if isinstance(call, NormScaleShift)
        else ("gate",)
        if isinstance(call, ScaleResidual)
        else ("gate", "scale", "shift")
    )
    return {name: (getattr(call, name), getattr(call, f"{name}_table")) for name in names}
