"""In which form the linear layers behind an op take what it returns: as it is, quantised by a law
that all of them share, or both.

Whoever makes an activation asks :func:`law_for` before, since a norm or GELU can quantise in the
same kernel.

Nothing is quantised before a layer that a compiler traces (see
:func:`ditnorm.fused.quantized_linear.served_here`). So Dynamo is given that answer instead of the
questions.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..functional import quantize
from ..ops.quantization import BESIDE, Beside, Law, Quantized, Wanted, attach, attached
from ..swapping.hook_chains import wrapped
from ..swapping.originals import defined_in
from ..swapping.swapped import untouched
from ..swapping.torch_private import traced_as
from .lora_linear import LoraLinear
from .quantized_linear import QuantizedLinear, served_here


def no_law(*asked: Any, width: int | None = None) -> None:
    """:func:`law_for`, as Dynamo traces it."""


def _as_it_is(x: Any, *linears: Any) -> Any:
    return x


def _dense(x: Tensor, linear: Any) -> Tensor:
    return x.contiguous()


@traced_as(no_law)
def law_for(x: Tensor, *linears: Any, width: int | None = None) -> Wanted | None:
    """The law by which all of ``linears`` quantise an activation that has the shape and dtype of
    ``x``, or ``width`` columns if that is given.

    It is a :class:`Beside` where some of them are in adapters, which read the activation as it is.
    None: at least one of them takes it only as it is, so it mustn't be handed over quantised.
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
    """:func:`law_for` where not all of ``linears`` are layers of ours: some may be adapters."""
    bases = []
    for linear in linears:
        base = quantized_base(linear)
        if base is None or ("forward" in linear.__dict__ and wrapped(linear)):
            return None
        bases.append(base)
    law = law_for(x, *bases)
    if not isinstance(law, Law) or not untouched(*linears):
        return None
    if torch.is_inference_mode_enabled() and not all(map(_only_reads, linears)):
        return None
    return BESIDE[law]


def _only_reads(linear: Any) -> bool:
    """Whether nothing in an adapter can write to what it is given: in inference mode PyTorch
    wouldn't count that, and the next reader would be given what was quantised before.
    """
    inside = [module for name, part in linear._modules.items() if name != "base_layer" for module in part.modules()]
    return untouched(*inside) and not any(getattr(module, "inplace", False) for module in inside)


def quantized_base(linear: Any) -> Any:
    """``linear`` if it is a layer of ours, or the layer of ours inside an adapter of PEFT's, which
    hands on what it is given and doesn't write to it. Else None.
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
    """The law for two groups of readers of one activation, given that of each."""
    if first is second or first is None or second is None:
        return first if first is second else None
    laws = [law.law if isinstance(law, Beside) else law for law in (first, second)]
    return BESIDE[laws[0]] if laws[0] is laws[1] else None


@traced_as(_as_it_is)
def quantized_for(x: Any, *linears: Any) -> Any:
    """``x`` in the form in which all of ``linears`` take it: as it is, quantised, or with what it
    was quantised to attached. An ``x`` that comes quantised is returned as it is.
    """
    if type(x) is Quantized:
        return x
    law = law_for(x, *linears)
    if isinstance(law, Beside):
        return x if attached(x, law.law) is not None else attach(x.detach(), quantize(x, law.law))  # others hold x, and write to it
    return x if law is None else quantize(x, law)


@traced_as(_dense)
def dense_for(x: Tensor, linear: Any) -> Any:
    """``x``, a slice of a larger tensor, for ``linear`` to read: quantised, or else contiguous."""
    law = law_for(x, linear)
    return quantize(x, law) if isinstance(law, Law) else x.contiguous()


def hooked(module: Any) -> bool:
    """Whether somebody looks at what goes into ``module`` or comes out of it, or wraps its forward,
    be it only to move weights.
    """
    return ("forward" in module.__dict__ and wrapped(module)) or not untouched(module)
