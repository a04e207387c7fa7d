"""The GELU behind a linear, in place: at the peak of an MLP's memory its input and its output would both be alive."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class InPlaceGELU:
    """diffusers' ``GELU``, a linear with its activation: hidden_states [..., D] -> [..., inner dim]."""

    fingerprints = {"forward": frozenset({"04d27066e288"}), "gelu": frozenset({"5436b9b39a2e"})}  # 0.37.0 to 0.42.1

    proj: nn.Module
    approximate: str
    gelu: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.proj(hidden_states)
        if _overwritable(hidden_states, self.proj):
            return torch.ops.aten.gelu_(hidden_states, approximate=self.approximate)
        return self.gelu(hidden_states)


def activated(activation: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """``activation(linear(x))`` for a block that calls the two apart."""
    x = linear(x)
    if not _overwritable(x, linear) or type(activation) is not nn.GELU or "forward" in activation.__dict__ or _hooks(activation):
        return activation(x)
    return torch.ops.aten.gelu_(x, approximate=activation.approximate)


def _overwritable(x: Tensor, linear: nn.Module) -> bool:
    """Whether nobody else can hold ``x``, which ``linear`` has just returned: no backward pass, no hook or wrapper, no adapter."""
    return (
        not torch.compiler.is_compiling()  # it reuses memory by itself
        and not x.requires_grad
        and type(x) is Tensor
        and isinstance(linear, nn.Linear)
        and "forward" not in linear.__dict__
        and not _hooks(linear)
    )


def _hooks(module: nn.Module) -> bool:
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return bool(everywhere or module._forward_hooks or module._forward_pre_hooks)
