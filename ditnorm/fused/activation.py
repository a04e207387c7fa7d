"""The activation of a block's MLP, written by one kernel behind attention's result where the last
linear layer reads both, and SwiGLU alone.

Upstream's expression runs where there is no kernel, where that has other bits, and where somebody
wants to see it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import gelu, gelu_quantize, swiglu, swiglu_quantize
from ..ops.quantization import Law
from ..swapping.originals import replaced, replaced_functional
from .activation_sites import Activation, served
from .gelu import activated, activation_of, called_as_module, fits_epilogue, is_torchs_gelu, why_not
from .module import FusedModule
from .quantized_linear import law_for

_SILU_FORWARD = nn.SiLU.forward if replaced(nn.SiLU, "forward") is None else None
_SILU = F.silu if replaced_functional("silu") is None else None


def begun(activation: nn.Module, linear: nn.Module, x: Any, rounding: str) -> tuple[Tensor, bool]:
    """Of ``activation(linear(x))``, GELU for a block that joins it with attention's result later:
    ``linear(x)`` and True where :func:`joined` does the rest, else the whole and False.
    """
    if not _joins(activation) or (rounding == "single" and fits_epilogue(linear, x, activation.approximate)):
        return activated(activation, linear, x, rounding), False
    inner = linear(x)
    if served("gelu", inner):
        return inner, True
    return activation_of(activation, linear, inner), False


def joined(beside: Tensor, inner: Tensor, pending: bool, rounding: str, reader: Any) -> Any:
    """Attention's result and the MLP's side by side: [B, S, D], what :func:`begun` returned ->
    [B, S, D + inner dim], quantised where ``reader``, the layer that reads it, takes it so.
    """
    if not pending:
        return torch.cat([beside, inner], dim=-1)
    law = law_for(inner, reader, width=beside.shape[-1] + inner.shape[-1])
    return gelu_quantize(inner, law, beside) if isinstance(law, Law) else gelu(inner, beside, rounding=rounding)


def gelu_joined(path: str, activation: Any) -> Activation:
    """What :func:`begun` and :func:`joined` make of an activation."""
    if _joins(activation):
        reason = None
    elif is_torchs_gelu(activation):
        reason = "it isn't GELU in its tanh approximation"
    else:
        reason = why_not(activation, nn.GELU, "gelu")
    return Activation(path, "GELU and what stands beside it in one call", "gelu", reason)


class JoinedGELU:
    """A block that hands its ``act_mlp`` to :func:`begun`."""

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        """See :class:`FusedModule`."""
        yield gelu_joined("act_mlp", module.act_mlp)


def _joins(activation: Any) -> bool:
    return is_torchs_gelu(activation) and activation.approximate == "tanh"


def is_torchs_silu(activation: nn.Module) -> bool:
    """Whether a call of a module is PyTorch's SiLU, and nobody looks at it."""
    return type(activation).forward is _SILU_FORWARD and called_as_module(activation)


def silu_joined(path: str, activation: nn.Module) -> Activation:
    """What :func:`silu_gated` makes of a SiLU where :func:`is_torchs_silu` is asked before."""
    return swiglu_in(path, None if is_torchs_silu(activation) else why_not(activation, nn.SiLU, "silu"))


def swiglu_in(path: str, reason: str | None = None) -> Activation:
    """What :func:`silu_gated` makes of ``F.silu``; ``reason``: why it isn't called."""
    if reason is None and F.silu is not _SILU:
        reason = replaced_functional("silu") or "torch.nn.functional.silu was replaced before ditnorm was imported"
    return Activation(path, "SwiGLU in one call", "swiglu", reason)


def silu_gated(x: Tensor, value: Tensor, beside: Tensor | None = None, *, rounding: str, reader: Any = None) -> Any:
    """``F.silu(x) * value``, behind ``beside`` if that is given: x and value of one shape.
    Quantised where ``reader``, the layer that alone reads it, takes it so.
    """
    if _silu_served(x):
        return _swiglu(x, value, beside, rounding, reader)
    y = F.silu(x) * value
    return y if beside is None else torch.cat([beside, y], dim=-1)


def _swiglu(x: Tensor, value: Tensor, beside: Tensor | None, rounding: str, reader: Any) -> Any:
    law = None
    if reader is not None:
        law = law_for(x, reader, width=x.shape[-1] + (0 if beside is None else beside.shape[-1]))
    if isinstance(law, Law):
        return swiglu_quantize(x, value, law, beside, rounding=rounding)
    return swiglu(x, value, beside, rounding=rounding)


def gated(activation: nn.Module, gate: nn.Module, value: nn.Module, x: Any, rounding: str, reader: Any) -> Any:
    """``activation(gate(x)) * value(x)`` of a SiLU and two linear layers, quantised where
    ``reader``, the layer that reads it, takes it so. As upstream holds them, the gate isn't kept
    beside its SiLU.
    """
    y: Tensor = gate(x)
    if _silu_served(y):
        return _swiglu(y, value(x), None, rounding, reader)
    y = activation(y)
    return y * value(x)


def _silu_served(x: Tensor) -> bool:
    return F.silu is _SILU and served("swiglu", x)


class FusedSwiGLU(FusedModule):
    """diffusers' ``SwiGLU``, a linear layer with its activation: hidden_states [..., D] -> [...,
    inner dim].
    """

    fingerprints = {"forward": frozenset({"08fb870923dc"})}  # 0.37.0 to 0.42.1

    written_for = frozenset({"diffusers.models.activations.SwiGLU"})
    optional = True
    reported_as = "activation"

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        yield silu_joined("activation", module.activation)

    def forward(self, hidden_states: Any) -> Tensor:
        if not self.intact() or not is_torchs_silu(self.activation):
            return super().forward(hidden_states)  # type: ignore[misc]
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return silu_gated(gate, value, rounding=self.rounding)
