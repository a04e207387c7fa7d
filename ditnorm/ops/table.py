"""The table of ops: one row each, from which everything else about an op is made.

A new op is a row, the structure of its call, a reference function, and a kernel. Its gradients are
those of the reference, unless there is an op for them (:mod:`ditnorm.ops.gradients`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor

from . import (
    checks,
    checks_activation,
    checks_qk,
    checks_quantize,
    reference,
    reference_activation,
    reference_backward,
    reference_qk,
    reference_qk_backward,
    reference_quantize,
)
from .calls import (
    Gelu,
    JointQKNormRope,
    NormScaleResidual,
    NormScaleResidualNormScaleShift,
    NormScaleShift,
    QKNormRope,
    ScaleResidual,
    ScaleResidualNormScaleShift,
    SwiGLU,
)
from .calls_backward import (
    JointQKNormRopeBackward,
    NormScaleResidualBackward,
    NormScaleShiftBackward,
    NormScaleShiftBackwardParts,
    QKNormRopeBackward,
    ScaleResidualBackward,
    ScaleResidualNormScaleShiftBackward,
    SwiGLUBackward,
)
from .calls_quantize import (
    DequantizeProduct,
    GeluQuantize,
    NormScaleShiftQuantize,
    Quantize,
    ScaleResidualNormScaleShiftQuantize,
    SwiGLUQuantize,
)


@dataclass(frozen=True)
class Op:
    """An op of ``torch.ops.ditnorm``. Its functions take the structure of a call."""

    name: str
    call: Callable[..., Any]
    """The structure of its arguments, of :mod:`ditnorm.ops.calls`."""
    reference: Callable[[Any], Any]
    """The op in PyTorch's operations: a Tensor, or a tuple of Tensors."""
    check: Callable[[Any], None]
    """Raises an error that names what is wrong with a call."""
    unfused: Callable[[Any], str | None]
    """Why no kernel takes a call in which nothing is wrong, or None."""
    like: Callable[[Any], Any]
    """Empty tensors like the op's results."""

    @cached_property
    def schema(self) -> str:
        """As ``torch.library`` takes it."""
        kinds = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}
        arguments = ", ".join(f"{kinds.get(hint, 'int')} {name}" for name, hint in self._hints.items())
        results = get_args(get_type_hints(self.reference)["return"])
        return f"{self.name}({arguments}) -> {'(' + ', '.join('Tensor' for _ in results) + ')' if results else 'Tensor'}"

    @cached_property
    def tensors(self) -> int:
        """How many of its arguments, the first ones, are tensors."""
        return sum(hint in (Tensor, Tensor | None) for hint in self._hints.values())

    def named(self, arguments: tuple[Any, ...]) -> Any:
        """The call that arguments of the schema make: numbers become the names that they
        stand for.
        """
        return self.call(*(a if names is None else names[a] for a, names in zip(arguments, self._names, strict=True)))

    def expression(self, *arguments: Any, **named: Any) -> Any:
        """The reference of a call with these fields."""
        return self.reference(self.call(*arguments, **named))

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return get_type_hints(self.call, include_extras=True)

    @cached_property
    def _names(self) -> tuple[tuple[str, ...] | None, ...]:
        return tuple(get_args(hint)[1] if get_origin(hint) is Annotated else None for hint in self._hints.values())


def _always_fused(call: Any) -> None:
    """For ops whose kernel takes every call in which nothing is wrong."""


def _like_joined(call: JointQKNormRope) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = call.query.shape
    shape = (batch, tokens + call.encoder_query.shape[1], width // call.head_dim, call.head_dim)
    return call.query.new_empty(shape), call.query.new_empty(shape), call.query.new_empty(shape)


OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        Op(
            "norm_scale_shift",
            NormScaleShift,
            reference.norm_scale_shift,
            checks.check,
            checks.unfused,
            lambda call: call.x.new_empty(call.x.shape),
        ),
        Op(
            "scale_residual_norm_scale_shift",
            ScaleResidualNormScaleShift,
            reference.scale_residual_norm_scale_shift,
            checks.check,
            checks.unfused,
            lambda call: (call.x.new_empty(call.x.shape), call.residual.new_empty(call.x.shape)),
        ),
        Op(
            "scale_residual",
            ScaleResidual,
            reference.scale_residual,
            checks.check,
            checks.unfused,
            lambda call: call.residual.new_empty(call.x.shape),
        ),
        Op(
            "qk_norm_rope",
            QKNormRope,
            reference_qk.qk_norm_rope,
            checks_qk.check,
            checks_qk.unfused,
            lambda call: tuple(t.new_empty(t.unflatten(-1, (-1, call.head_dim)).shape) for t in (call.query, call.key)),
        ),
        Op(
            "joint_qk_norm_rope",
            JointQKNormRope,
            reference_qk.joint_qk_norm_rope,
            checks_qk.check,
            checks_qk.unfused,
            _like_joined,
        ),
        Op(
            "norm_scale_residual",
            NormScaleResidual,
            reference.norm_scale_residual,
            checks.check_sandwich,
            checks.unfused_sandwich,
            lambda call: call.residual.new_empty(call.x.shape),
        ),
        Op(
            "norm_scale_residual_norm_scale_shift",
            NormScaleResidualNormScaleShift,
            reference.norm_scale_residual_norm_scale_shift,
            checks.check_sandwich,
            checks.unfused_sandwich,
            lambda call: (call.x.new_empty(call.x.shape), call.residual.new_empty(call.x.shape)),
        ),
        Op(
            "quantize",
            Quantize,
            reference_quantize.quantize,
            checks_quantize.check,
            _always_fused,
            lambda call: checks_quantize.like_quantized(call.x, call.law),
        ),
        Op(
            "gelu_quantize",
            GeluQuantize,
            reference_quantize.gelu_quantize,
            checks_quantize.check_activation,
            checks_quantize.unfused_activation,
            checks_quantize.like_activation,
        ),
        Op(
            "swiglu_quantize",
            SwiGLUQuantize,
            reference_quantize.swiglu_quantize,
            checks_quantize.check_activation,
            checks_quantize.unfused_activation,
            checks_quantize.like_activation,
        ),
        Op(
            "gelu",
            Gelu,
            reference_activation.gelu,
            checks_activation.check,
            checks_activation.unfused,
            checks_activation.like,
        ),
        Op(
            "swiglu",
            SwiGLU,
            reference_activation.swiglu,
            checks_activation.check,
            checks_activation.unfused,
            checks_activation.like,
        ),
        Op(
            "dequantize_product",
            DequantizeProduct,
            reference_quantize.dequantize_product,
            checks_quantize.check_product,
            _always_fused,
            lambda call: call.product.new_empty(call.product.shape, dtype=call.dtype),
        ),
        Op(
            "norm_scale_shift_quantize",
            NormScaleShiftQuantize,
            reference_quantize.norm_scale_shift_quantize,
            checks_quantize.check_site,
            checks_quantize.unfused_site,
            lambda call: checks_quantize.like_quantized(call.x, call.law),
        ),
        Op(
            "scale_residual_norm_scale_shift_quantize",
            ScaleResidualNormScaleShiftQuantize,
            reference_quantize.scale_residual_norm_scale_shift_quantize,
            checks_quantize.check_site,
            checks_quantize.unfused_site,
            lambda call: (*checks_quantize.like_quantized(call.x, call.law), call.residual.new_empty(call.x.shape)),
        ),
        Op(
            "norm_scale_shift_and_quantize",
            NormScaleShiftQuantize,
            reference_quantize.norm_scale_shift_and_quantize,
            checks_quantize.check_site,
            checks_quantize.unfused_site,
            lambda call: (call.x.new_empty(call.x.shape), *checks_quantize.like_quantized(call.x, call.law)),
        ),
        Op(
            "scale_residual_norm_scale_shift_and_quantize",
            ScaleResidualNormScaleShiftQuantize,
            reference_quantize.scale_residual_norm_scale_shift_and_quantize,
            checks_quantize.check_site,
            checks_quantize.unfused_site,
            lambda call: (
                call.x.new_empty(call.x.shape),
                *checks_quantize.like_quantized(call.x, call.law),
                call.residual.new_empty(call.x.shape),
            ),
        ),
        Op(
            "norm_scale_shift_backward",
            NormScaleShiftBackward,
            reference_backward.norm_scale_shift_backward,
            checks.check_backward,
            _always_fused,
            lambda call: call.x.new_empty(call.x.shape),
        ),
        Op(
            "scale_residual_norm_scale_shift_backward",
            ScaleResidualNormScaleShiftBackward,
            reference_backward.scale_residual_norm_scale_shift_backward,
            checks.check_backward,
            _always_fused,
            lambda call: (call.r.new_empty(call.r.shape), call.r.new_empty(call.r.shape)),
        ),
        Op(
            "scale_residual_backward",
            ScaleResidualBackward,
            reference_backward.scale_residual_backward,
            checks.check_backward,
            _always_fused,
            lambda call: call.dr.new_empty(call.dr.shape),
        ),
        Op(
            "norm_scale_shift_backward_parts",
            NormScaleShiftBackwardParts,
            reference_backward.norm_scale_shift_backward_parts,
            checks.check_backward_parts,
            _always_fused,
            lambda call: (call.x.new_empty(call.x.shape), call.x.new_empty(call.x.shape)),
        ),
        Op(
            "norm_scale_residual_backward",
            NormScaleResidualBackward,
            reference_backward.norm_scale_residual_backward,
            checks.check_sandwich_backward,
            _always_fused,
            lambda call: call.x.new_empty(call.x.shape),
        ),
        Op(
            "swiglu_backward",
            SwiGLUBackward,
            reference_activation.swiglu_backward,
            checks_activation.check_backward,
            _always_fused,
            lambda call: (call.x.new_empty(call.x.shape), call.x.new_empty(call.x.shape)),
        ),
        Op(
            "qk_norm_rope_backward",
            QKNormRopeBackward,
            reference_qk_backward.qk_norm_rope_backward,
            checks_qk.check_backward,
            _always_fused,
            lambda call: (call.query.new_empty(call.query.shape), call.key.new_empty(call.key.shape)),
        ),
        Op(
            "joint_qk_norm_rope_backward",
            JointQKNormRopeBackward,
            reference_qk_backward.joint_qk_norm_rope_backward,
            checks_qk.check_backward,
            _always_fused,
            lambda call: tuple(t.new_empty(t.shape) for t in (call.query, call.key, call.encoder_query, call.encoder_key)),
        ),
    )
}
"""By name, in the order in which the compiled library counts their calls."""
