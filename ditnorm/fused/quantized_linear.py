"""Linear layers whose weights are quantised, and their activations in each call: the matrix
product, called without the detour over the weight's own dispatch, of an activation that is
quantised in one pass, or behind the op that made it.

What isn't served here, torchao serves: weights and configurations that aren't known, gradients,
autocast, compilers.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import dequantize_product, norm_scale_shift_and_quantize, norm_scale_shift_quantize, quantize
from ..functional.quantised import values_and_scale
from ..ops import quantization, reference
from ..ops.bits import same_bits
from ..ops.calls import NormScaleShift
from ..ops.options import HALVES
from ..ops.quantization import BESIDE, FLOAT8_CAPABILITY, INT8_ROW, Beside, Law, Quantized, Wanted, attach, attached
from ..swapping.hook_chains import wrapped
from ..swapping.originals import defined_in, replaced, replaced_functional
from ..swapping.swapped import untouched
from ..swapping.torch_private import any_autocast_enabled, int_mm, scaled_mm
from .int8_product import int8_product
from .lora_linear import LoraLinear
from .module import FusedModule, upstream_of
from .quantized_weights import law_of, operand_of, quantises_activations
from .sites import FusedCall, random_numbers

_ROWS = 2304  # that a verification quantises: enough for the kernels of many rows

_is_compiling = torch.compiler.is_compiling
_LINEAR = F.linear if replaced_functional("linear") is None else None


class QuantizedLinear(FusedModule):
    """``nn.Linear`` with a quantised weight: [..., in_features], or what it was quantised to ->
    [..., out_features].
    """

    fingerprints = {}

    optional = True
    reported_as = "matrix product"
    demanded = False

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether it is PyTorch's, and PyTorch's own."""
        return cls.unknown(upstream) is None

    @classmethod
    def unknown(cls, upstream: type) -> str | None:
        """What stands in PyTorch's place."""
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
        """Why torchao serves it."""
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
        """What ``module`` multiplies by; None where its own library serves it."""
        return operand_of(module._parameters["weight"])

    @staticmethod
    def multiplied(x: Quantized, module: Any) -> Tensor:
        """``module(x)``, whether its class has been swapped or not."""
        parameters = module._parameters
        values, scale, shape, dtype, _ = x
        return product(values, scale, shape, dtype, operand_of(parameters["weight"]), parameters["bias"])

    def forward(self, input: Tensor | Quantized) -> Tensor:
        parameters = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
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
    """The matrix product as torchao calls it, of what is in a :class:`Quantized`: [..., D],
    quantised by the law of ``operand`` [N, D] -> [..., N].
    """
    if operand.law is INT8_ROW:
        y = dequantize_product(int8_product(values, operand), scale, operand.scale, bias, dtype)
    else:  # no keywords: a fifth of a microsecond
        y = scaled_mm(values, operand.values, scale, operand.scale, bias, None, dtype, operand.fast)
    if len(shape) == 3:  # as streams are, and in two thirds of the time of the general case
        batch, rows, _ = shape
        return y.view(batch, rows, -1)
    return y if len(shape) == 2 else y.view(*shape[:-1], -1)


def law_for(x: Tensor, *linears: Any, width: int | None = None) -> Wanted | None:
    """The law by which all of ``linears`` quantise an activation with the shape and dtype of ``x``,
    ``width`` columns if that is given.

    Beside the activation where some of them are in adapters, which read it as it is. None where one
    of them wants nothing else: then nothing may be handed over quantised.
    """
    for linear in linears:  # first: most models aren't quantised
        if not isinstance(linear, QuantizedLinear):
            return _law_beside(x, linears)
        if "forward" in linear.__dict__ and wrapped(linear):
            return None
    if not served_here(x) or not untouched(*linears):
        return None
    shape, dtype, law = x.shape, x.dtype, None
    if width is not None:
        shape = torch.Size((*shape[:-1], width))
    for linear in linears:
        operand = linear.operand_in(linear)
        if operand is None or not operand.takes(shape, dtype, linear._parameters["bias"]) or (law is not None and operand.law is not law):
            return None
        law = operand.law
    return law


def _law_beside(x: Tensor, linears: tuple[Any, ...]) -> Beside | None:
    """:func:`law_for` where not all are layers of ours."""
    bases = []
    for linear in linears:
        base = quantized_base(linear)
        if base is None or ("forward" in linear.__dict__ and wrapped(linear)):
            return None
        bases.append(base)
    law = law_for(x, *bases)
    return BESIDE[law] if isinstance(law, Law) and untouched(*linears) else None


def quantized_base(linear: Any) -> Any:
    """The layer of ours that ``linear`` is, or that is in an adapter of PEFT's, which hands it on
    what it is given itself, and writes to nothing. Else None.
    """
    if isinstance(linear, QuantizedLinear):
        return linear
    base = None if linear is None else linear._modules.get("base_layer")
    if not isinstance(base, QuantizedLinear):
        return None
    return base if isinstance(linear, LoraLinear) or _is_pefts(type(linear).forward) else None


@functools.cache
def _is_pefts(forward: Callable[..., Any]) -> bool:
    return isinstance(forward, FunctionType) and defined_in(forward, "peft")


def shared_law(first: Wanted | None, second: Wanted | None) -> Wanted | None:
    """The law of two readers of one activation."""
    if first is second or first is None or second is None:
        return first if first is second else None
    laws = [law.law if isinstance(law, Beside) else law for law in (first, second)]
    return BESIDE[laws[0]] if laws[0] is laws[1] else None


def quantized_for(x: Any, *linears: Any) -> Any:
    """``x``, quantised where all of ``linears`` take it so, or with what it was quantised to; as it
    is where it comes quantised already.
    """
    if type(x) is Quantized:
        return x
    law = law_for(x, *linears)
    if isinstance(law, Beside):
        return x if attached(x, law.law) is not None else attach(x, quantize(x, law.law))
    return x if law is None else quantize(x, law)


def dense_for(x: Tensor, linear: Any) -> Any:
    """``x``, a part of a tensor, as ``linear`` reads it best: quantised where it stands, or copied
    to be contiguous.
    """
    law = law_for(x, linear)
    return quantize(x, law) if isinstance(law, Law) else x.contiguous()


def hooked(module: Any) -> bool:
    """Whether somebody looks at what goes into ``module`` or comes out of it, or has a hook there
    that moves its weights.
    """
    return ("forward" in module.__dict__ and wrapped(module)) or not untouched(module)


def float8_unsupported() -> str | None:
    """Why no float8 matrices are multiplied here, or None."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_initialized() else (9, 0)
    return None if capability >= FLOAT8_CAPABILITY else f"float8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"


def served_here(x: Tensor) -> bool:
    """Whether nothing but the values of ``x`` matters: no graph, no compiler, no autocast, no
    tensor of another kind, nobody in PyTorch's place.
    """
    if _is_compiling():
        return False
    plain = type(x) is Tensor and x.dtype in HALVES and F.linear is _LINEAR
    return plain and not torch.is_grad_enabled() and not any_autocast_enabled()


@dataclass(frozen=True)
class QuantizedProduct:
    """A quantised matrix product, with a quantiser of its activation."""

    law: Law
    width: int
    out: int
    dtype: torch.dtype
    bias: bool
    body: type[QuantizedLinear]
    linear: weakref.ref[Any] = field(compare=False)
    """One of the layers: which one doesn't matter, and what was verified must not keep it alive."""

    @property
    def op(self) -> str:
        return "quantize"

    @property
    def quantised(self) -> str | None:
        return str(self.law)

    @property
    def fused(self) -> bool:
        return self.dtype in HALVES

    def __str__(self) -> str:
        return f"{self.law} ({self.dtype}, {self.width} to {self.out})".replace("torch.", "")

    def same_bits(self, device: torch.device) -> bool:
        """Values and scales against the law in PyTorch, and the product against upstream's own."""
        linear, rows = self.linear(), self._rows(device)
        if not self._same_values(rows):
            return False
        if linear is None or linear.weight.device != device:
            return True  # offloaded: no weight to multiply with
        operand = self.body.operand_in(linear)
        if operand is None or operand.law is not self.law or not operand.takes(rows.shape, rows.dtype, linear.bias):
            return True
        upstream: Any = upstream_of(type(linear))
        return same_bits(self.body.multiplied(quantize(rows, self.law), linear), upstream.forward(linear, rows))

    def _rows(self, device: torch.device) -> Tensor:
        random = random_numbers(device)
        x, spread = random(_ROWS, self.width), random(_ROWS, 1)
        return (x * (2 * spread).exp()).to(self.dtype)

    def _same_values(self, rows: Tensor) -> bool:
        """Of an activation as it is, and of what a norm makes of it, with tables and without."""
        law = self.law
        scale, shift = rows[:2].chunk(2)
        norm: dict[str, Any] = {"norm": "layer", "eps": 1e-6, "rounding": "eager"}

        def same(found: Quantized, expected: Tensor) -> bool:
            return same_bits((found.values, found.scale), quantization.quantize(expected, law))

        def same_behind_a_norm(*tables: Tensor | None) -> bool:
            scale_table, shift_table = tables
            call = NormScaleShift(rows, scale, shift, None, None, scale_table, shift_table, None, **norm)
            expected, options = reference.norm_scale_shift(call), norm | {"scale_table": scale_table, "shift_table": shift_table}
            y, beside = norm_scale_shift_and_quantize(rows, scale, shift, law=law, **options)
            found = norm_scale_shift_quantize(rows, scale, shift, law=law, **options)
            return same(found, expected) and same(beside, expected) and same_bits(y, expected)

        return same(quantize(rows, law), rows) and same_behind_a_norm(None, None) and same_behind_a_norm(*rows[2:4].float())
