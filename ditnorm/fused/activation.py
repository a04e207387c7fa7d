"""The activation of a block's MLP: GELU or SwiGLU behind attention's result, in the one tensor that
the block's last linear layer reads, and SwiGLU alone.

Functions called ``describe_*`` say for the report what the others will do. Upstream's expression
runs where there is no kernel, where the kernel has other bits, and where somebody, such as a hook,
sees the activation.
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
from .gelu import activate, activate_linear, called_as_module, fits_epilogue, is_torchs_gelu, why_not
from .laws import law_for
from .module import FusedModule

_SILU_FORWARD = nn.SiLU.forward if replaced(nn.SiLU, "forward") is None else None
_SILU = F.silu if replaced_functional("silu") is None else None


def start_mlp(activation: nn.Module, linear: nn.Module, x: Any, rounding: str) -> tuple[Tensor, bool]:
    """The MLP of a block that joins it with attention's result later. Returns ``linear(x)`` and
    True where :func:`join_mlp` is to apply GELU, else ``activation(linear(x))`` and False.
    """
    if not _joins(activation) or (rounding == "single" and fits_epilogue(linear, x, activation.approximate)):
        return activate_linear(activation, linear, x, rounding), False
    inner = linear(x)
    if served("gelu", inner):
        return inner, True
    return activate(activation, linear, inner), False


def join_mlp(beside: Tensor, inner: Tensor, pending: bool, rounding: str, reader: Any) -> Any:
    """Attention's result ``beside`` [B, S, D] and the MLP's, which is what :func:`start_mlp`
    returned
    -> [B, S, D + inner dim], quantised where ``reader``, the layer that reads it, takes it so.
    """
    if not pending:
        return torch.cat([beside, inner], dim=-1)
    law = law_for(inner, reader, width=beside.shape[-1] + inner.shape[-1])
    return gelu_quantize(inner, law, beside) if isinstance(law, Law) else gelu(inner, beside, rounding=rounding)


def describe_joined_gelu(path: str, activation: Any) -> Activation:
    """Describes what :func:`start_mlp` and :func:`join_mlp` make of ``activation``."""
    if _joins(activation):
        reason = None
    elif is_torchs_gelu(activation):
        reason = "it isn't GELU in its tanh approximation"
    else:
        reason = why_not(activation, nn.GELU, "gelu")
    return Activation(path, "GELU and what stands beside it in one call", "gelu", reason)


class JoinedGELU:
    """A block whose ``act_mlp`` goes through :func:`start_mlp` and :func:`join_mlp`."""

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        """See :class:`FusedModule`."""
        yield describe_joined_gelu("act_mlp", module.act_mlp)


def _joins(activation: Any) -> bool:
    return is_torchs_gelu(activation) and activation.approximate == "tanh"


def is_torchs_silu(activation: nn.Module) -> bool:
    """Whether a call of ``activation`` runs PyTorch's SiLU and nothing else, and nobody looks at
    it.
    """
    return type(activation).forward is _SILU_FORWARD and called_as_module(activation)


def describe_silu_module(path: str, activation: nn.Module) -> Activation:
    """Describes what :func:`silu_gated` makes of a module that :func:`is_torchs_silu` is asked
    of.
    """
    return describe_silu_function(path, None if is_torchs_silu(activation) else why_not(activation, nn.SiLU, "silu"))


def describe_silu_function(path: str, reason: str | None = None) -> Activation:
    """Describes what :func:`silu_gated` makes of ``F.silu``. ``reason``: why it isn't called, if
    the caller knows one.
    """
    if reason is None and F.silu is not _SILU:
        reason = replaced_functional("silu") or "torch.nn.functional.silu was replaced before ditnorm was imported"
    return Activation(path, "SwiGLU in one call", "swiglu", reason)


def silu_gated(x: Tensor, value: Tensor, beside: Tensor | None = None, *, rounding: str, reader: Any = None) -> Any:
    """``F.silu(x) * value``, behind ``beside`` if that is given; ``x`` and ``value`` have one
    shape. It is quantised where ``reader``, the only layer that reads it, takes it so.
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


def gated_linears(activation: nn.Module, gate: nn.Module, value: nn.Module, x: Any, rounding: str, reader: Any) -> Any:
    """``activation(gate(x)) * value(x)`` of a SiLU and two linear layers, quantised where
    ``reader``, the layer that reads it, takes it so. As in upstream's expression, the gate is freed
    before ``value`` runs where its SiLU is a call of its own.
    """
    y: Tensor = gate(x)
    if _silu_served(y):
        return _swiglu(y, value(x), None, rounding, reader)
    y = activation(y)
    return y * value(x)


def _silu_served(x: Tensor) -> bool:
    return F.silu is _SILU and served("swiglu", x)


class FusedSwiGLU(FusedModule):
    """diffusers' ``SwiGLU``, a linear layer with its activation: ``hidden_states`` [..., D] ->
    [..., inner dim].
    """

    fingerprints = {"forward": frozenset({"08fb870923dc"})}  # 0.37.0 to 0.42.1

    written_for = frozenset({"diffusers.models.activations.SwiGLU"})
    optional = True
    reported_as = "activation"

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        yield describe_silu_module("activation", module.activation)

    def forward(self, hidden_states: Any) -> Tensor:
        if not self.intact() or not is_torchs_silu(self.activation):
            return super().forward(hidden_states)  # type: ignore[misc]
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return silu_gated(gate, value, rounding=self.rounding)
