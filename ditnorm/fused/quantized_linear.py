"""Linear layers with quantised weights that quantise their activations in each call.

The matrix product is called without the detour over the weight's own dispatch. The activation is
quantised in one pass, or comes quantised from the op that made it (:mod:`ditnorm.fused.laws`).
torchao serves the rest: weights and configurations that aren't known, gradients, autocast,
compilers.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import dequantize_product
from ..functional.quantised import values_and_scale
from ..ops.options import HALVES
from ..ops.quantization import FLOAT8_CAPABILITY, INT8_ROW, Law, Quantized, attached
from ..swapping.originals import replaced, replaced_functional
from ..swapping.torch_private import any_autocast_enabled, int_mm, scaled_mm, traced_as
from .int8_product import int8_product
from .module import FusedModule, upstream_of
from .quantized_sites import QuantizedProduct
from .quantized_weights import law_of, operand_of, quantises_activations
from .sites import FusedCall

_is_compiling = torch.compiler.is_compiling
_LINEAR = F.linear if replaced_functional("linear") is None else None


class QuantizedLinear(FusedModule):
    """``nn.Linear`` with a quantised weight. The input [..., in_features] may come as it is or as a
    :class:`Quantized`; the result is [..., out_features].
    """

    fingerprints = {}

    optional = True
    reported_as = "matrix product"
    demanded = False

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether it is ``nn.Linear``, with PyTorch's own forward."""
        return cls.unknown(upstream) is None

    @classmethod
    def unknown(cls, upstream: type) -> str | None:
        """What ``upstream`` is instead, in words, or None."""
        return replaced(nn.Linear, "forward") if upstream is nn.Linear else f"{upstream.__qualname__} is not torch.nn.Linear"

    @classmethod
    def applies_to(cls, module: nn.Module) -> bool:
        """Whether ``module`` has a weight with which torchao quantises activations. Where it
        doesn't, no op of ours is missing.
        """
        weight = module._parameters.get("weight")
        return weight is not None and upstream_of(type(module)) is nn.Linear and quantises_activations(weight)

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why torchao serves ``module``, or None."""
        if scaled_mm is None or int_mm is None:
            return "this PyTorch has other matrix products"
        law = law_of(module.weight)  # type: ignore[arg-type]
        if isinstance(law, str):
            return law
        return None if law is INT8_ROW else float8_unsupported()

    @classmethod
    def calls(cls, module: Any, dtype: torch.dtype) -> Iterator[FusedCall]:
        """One, on a stream of ``dtype``."""
        law = law_of(module.weight)
        if isinstance(law, Law):
            bias = module.bias is not None
            yield QuantizedProduct(law, module.in_features, module.out_features, dtype, bias, cls, weakref.ref(module))

    @staticmethod
    def operand_in(module: Any) -> Any:
        """The operand that ``module`` multiplies by; None where its own library serves it, or where
        it doesn't have weight and bias among its Parameters.
        """
        parameters = module._parameters
        return operand_of(parameters.get("weight")) if "bias" in parameters else None

    @staticmethod
    def multiplied(x: Quantized, module: Any) -> Tensor:
        """``module(x)``, whether its class has been swapped or not."""
        parameters = module._parameters
        values, scale, shape, dtype, _ = x
        return product(values, scale, shape, dtype, operand_of(parameters["weight"]), parameters["bias"])

    def traced_forward(self, input: Tensor | Quantized) -> Tensor:
        """``forward``, as Dynamo traces it: torchao's, but where ``input`` is quantised already."""
        return self.multiplied(input, self) if isinstance(input, Quantized) else nn.Linear.forward(self, input)  # type: ignore[arg-type]

    @traced_as(traced_forward)
    def forward(self, input: Tensor | Quantized) -> Tensor:
        parameters = self._parameters
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # a buffer, an attribute, a parametrization
            return super().forward(input)  # type: ignore[misc]
        if isinstance(input, Quantized):
            values, scale, shape, dtype, _ = input
            return product(values, scale, shape, dtype, operand_of(weight), bias)
        if served_here(input) and self.as_made():
            operand, shape, dtype = operand_of(weight), input.shape, input.dtype
            if operand is not None and operand.takes(shape, dtype, bias):
                found = attached(input, operand.law)
                values, scale = values_and_scale(input, operand.law) if found is None else found[:2]
                return product(values, scale, shape, dtype, operand, bias)
        return super().forward(input)  # type: ignore[misc]


def product(values: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype, operand: Any, bias: Tensor | None) -> Tensor:
    """The matrix product as torchao calls it, of an activation [..., D], given as the fields of a
    :class:`Quantized` of the law of ``operand``, and the weight [N, D] -> [..., N].
    """
    if operand.law is INT8_ROW:
        y = dequantize_product(int8_product(values, operand), scale, operand.scale, bias, dtype)
    else:  # no keywords: a fifth of a microsecond
        y = scaled_mm(values, operand.values, scale, operand.scale, bias, None, dtype, operand.fast)
    if len(shape) == 3:  # as streams are, and in two thirds of the time of the general case
        batch, rows, _ = shape
        return y.view(batch, rows, -1)
    return y if len(shape) == 2 else y.view(*shape[:-1], -1)


def float8_unsupported() -> str | None:
    """Why no float8 matrices are multiplied here, or None."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_initialized() else (9, 0)
    return None if capability >= FLOAT8_CAPABILITY else f"float8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"


def served_here(x: Tensor) -> bool:
    """Whether a call on ``x`` is one that is served here: a plain tensor in half precision, no
    gradients, compiler or autocast, and nobody in the place of PyTorch's ``linear``.
    """
    if _is_compiling():
        return False
    plain = type(x) is Tensor and x.dtype in HALVES and F.linear is _LINEAR
    return plain and not torch.is_grad_enabled() and not any_autocast_enabled()
