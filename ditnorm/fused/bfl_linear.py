"""diffusers' ``BFLFP8RLinear``, the float8 layers of Black Forest Labs' own checkpoints ("fp8r"): a
plain weight with a scale for each row, and activations quantised as torchao does it, but in
float32.
"""

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import quantize
from ..ops.quantization import FLOAT8_CAPABILITY, FLOAT8_ROW_BFL, Quantized, attached
from ..swapping.torch_private import scaled_mm
from .module import matches, upstream_of
from .quantized_linear import QuantizedLinear, float8_unsupported, served_here
from .quantized_sites import QuantizedProduct
from .sites import FusedCall

_MULTIPLE = 16  # of which in_features and out_features have to be multiples for diffusers to multiply in float8


class BFLOperand:
    """The weight of such a layer as far as an activation is concerned."""

    __slots__ = ("multiplied", "width")

    law = FLOAT8_ROW_BFL

    def __init__(self, module: Any) -> None:
        weight: Tensor = module._parameters["weight"]
        self.multiplied: bool = weight.is_cuda and _multiplies_float8(weight.device)
        """Whether it is multiplied in float8 where it is now, to which it may have been moved since
        it was patched.
        """
        self.width: int = module.in_features

    def takes(self, shape: Sequence[int], dtype: torch.dtype, bias: Tensor | None) -> bool:
        """Whether an activation of this shape is quantised where the weight is."""
        return self.multiplied and len(shape) >= 2 and shape[-1] == self.width and 0 not in shape


@functools.cache
def _multiplies_float8(device: torch.device) -> bool:
    """Whether diffusers multiplies float8 matrices on a GPU."""
    return torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


class BFLLinear(QuantizedLinear):
    """[..., in_features], or what it was quantised to -> [..., out_features]. Where float8 matrices
    aren't multiplied, as on the CPU, upstream multiplies by what its weight stands for.
    """

    fingerprints = {"forward": frozenset({"f498ab2e057f"})}  # 0.42.0, 0.42.1

    weight_scale: Tensor
    compute_dtype: torch.dtype
    in_features: int

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether it is diffusers', of a version that is known."""
        return matches(cls, upstream)

    @classmethod
    def unknown(cls, upstream: type) -> str | None:
        return super(QuantizedLinear, cls).unknown(upstream)

    @classmethod
    def applies_to(cls, module: nn.Module) -> bool:
        return cls.knows(upstream_of(type(module)))

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        if scaled_mm is None:
            return "this PyTorch has other matrix products"
        if module.in_features % _MULTIPLE or module.out_features % _MULTIPLE:
            return "diffusers multiplies by what its weight stands for: its shape isn't a multiple of 16"
        return float8_unsupported()

    @classmethod
    def calls(cls, module: Any, dtype: torch.dtype) -> Iterator[FusedCall]:
        bias = module.bias is not None
        yield QuantizedProduct(FLOAT8_ROW_BFL, module.in_features, module.out_features, dtype, bias, cls, weakref.ref(module))

    @staticmethod
    def operand_in(module: Any) -> Any:
        parameters = module._parameters
        return BFLOperand(module) if "weight" in parameters and "bias" in parameters else None

    @staticmethod
    def multiplied(x: Quantized, module: Any) -> Tensor:
        parameters = module._parameters
        scale = module.weight_scale[None]
        y = scaled_mm(x.values, parameters["weight"].t(), x.scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        y = y.view(*x.shape[:-1], -1).to(module.compute_dtype)
        bias = parameters["bias"]
        return y if bias is None else y + bias

    def forward(self, inputs: Tensor | Quantized) -> Tensor:
        if isinstance(inputs, Quantized):
            return self.multiplied(inputs, self)
        operand = self.operand_in(self) if served_here(inputs) and self.as_made() else None
        if operand is None or not operand.takes(inputs.shape, inputs.dtype, None):
            return super(QuantizedLinear, self).forward(inputs)  # type: ignore[misc]
        return self.multiplied(attached(inputs, FLOAT8_ROW_BFL) or quantize(inputs, FLOAT8_ROW_BFL), self)


QUANTIZED_LINEARS: tuple[type[QuantizedLinear], ...] = (QuantizedLinear, BFLLinear)


def quantized_body(module: nn.Module) -> type[QuantizedLinear] | None:
    """The body of a linear layer that quantises its activations; None of others."""
    return next((body for body in QUANTIZED_LINEARS if body.applies_to(module)), None)
