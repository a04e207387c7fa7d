"""The arguments of each op as one structure, which all code takes that needs them by name.

The fields are the op's arguments in the order of its schema: tensors first, then options.
"""

from typing import NamedTuple

from torch import Tensor

from .options import Norm, Pairs, QKNorm, Rounding


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
        """The tables that the key is rotated by."""
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


SandwichCall = NormScaleResidual | NormScaleResidualNormScaleShift
"""A call at a site whose branch is normed before it is added."""
SiteCall = NormScaleShift | ScaleResidualNormScaleShift | ScaleResidual
"""A call at a norm site of a block."""
QKCall = QKNormRope | JointQKNormRope
ActivationCall = Gelu | SwiGLU
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
