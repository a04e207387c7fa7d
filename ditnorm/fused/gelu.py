"""The GELU behind a linear layer.

It runs in place: memory peaks in an MLP, where GELU's input and output would both be alive. In a
training step it's the gradient that is written in place, for the same reason. With
``rounding="single"`` the kernel of the matrix product applies GELU itself, before it rounds.
"""

from collections.abc import Iterator
from types import FunctionType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.context import autocasts, transformed
from ..ops.options import HALVES
from ..swapping.hook_chains import wrapped
from ..swapping.originals import defined_in, full_name, replaced, replaced_functional
from ..swapping.torch_private import (
    addmm_activation,
    compiled_alone,
    graph_is_kept,
    hooks_for_all_modules,
    in_a_batch,
    module_call,
    only_traced,
    outlived_transform,
    saves_through_hooks,
    seen_by_a_mode,
    without_transforms,
)
from .activation_sites import WATCHED, Activation
from .lora_linear import LoraLinear
from .module import FusedModule

# Torch's own functions as they are now, or None where somebody has replaced one already. Whoever
# replaces one later wants to see what goes through it.
_LINEAR_FORWARD = nn.Linear.forward if replaced(nn.Linear, "forward") is None else None
_GELU_FORWARD = nn.GELU.forward if replaced(nn.GELU, "forward") is None else None
_GELU = F.gelu if replaced_functional("gelu") is None else None
_LINEAR = F.linear if replaced_functional("linear") is None else None

_REPLACED = "a function of torch.nn.functional was replaced before ditnorm was imported"

_QUANTISERS = ("bitsandbytes", "diffusers", "ditnorm", "optimum")
"""Packages whose linear layers keep nothing of what they return, so that it may be overwritten.
(torchao's layers are ``nn.Linear`` with another weight.)
"""


class FusedGELU(FusedModule):
    """diffusers' ``GELU``, a linear layer with its activation: ``hidden_states`` [..., D] ->
    [..., inner dim].
    """

    fingerprints = {"forward": frozenset({"04d27066e288"}), "gelu": frozenset({"5436b9b39a2e"})}  # 0.37.0 to 0.42.1

    written_for = frozenset({"diffusers.models.activations.GELU"})
    optional = True
    reported_as = "activation"
    demanded = announced = False

    proj: nn.Module
    approximate: str
    gelu: Any

    def forward(self, hidden_states: Any) -> Tensor:
        if not self.intact():
            return super().forward(hidden_states)  # type: ignore[misc]
        if self.rounding == "single" and self.is_torchs() and fits_epilogue(self.proj, hidden_states, self.approximate):
            return linear_gelu(self.proj, hidden_states)
        return self.activate(self.proj(hidden_states))

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        yield Activation("", "GELU in place", reason=unlike_torchs() or _why_kept("proj", module.proj))

    def is_torchs(self) -> bool:
        """Whether the activation is still PyTorch's GELU."""
        return F.gelu is _GELU and "gelu" not in self.__dict__

    def activate(self, inner: Tensor) -> Tensor:
        """GELU of what ``proj`` has just returned."""
        done = _gelu_in_place(self.proj, inner, self.approximate) if self.is_torchs() else None
        return self.gelu(inner) if done is None else done


def activate_linear(activation: nn.Module, linear: nn.Module, x: Any, rounding: str) -> Tensor:
    """``activation(linear(x))`` for a block that calls the two separately."""
    if is_torchs_gelu(activation) and rounding == "single" and fits_epilogue(linear, x, activation.approximate):
        return linear_gelu(linear, x)
    return activate(activation, linear, linear(x))


def activate(activation: nn.Module, linear: nn.Module, inner: Tensor) -> Tensor:
    """``activation(inner)`` of what ``linear`` has just returned."""
    done = _gelu_in_place(linear, inner, activation.approximate) if is_torchs_gelu(activation) else None
    return activation(inner) if done is None else done


def is_torchs_gelu(activation: nn.Module) -> bool:
    """Whether a call of ``activation`` runs PyTorch's GELU and nothing else, and nobody looks at
    it.
    """
    return type(activation).forward is _GELU_FORWARD and F.gelu is _GELU and called_as_module(activation)


def why_not(activation: nn.Module, expected: type[nn.Module], function: str) -> str:
    """Why a call of ``activation`` isn't one of ``expected``, a module of torch that calls
    ``function``.
    """
    cls = type(activation)
    if cls.forward is not expected.forward:
        return f"{full_name(cls)} is not torch.nn.{expected.__name__}"
    return replaced(expected, "forward") or replaced_functional(function) or called_otherwise(activation)


def called_otherwise(module: nn.Module) -> str:
    """What a call of ``module`` runs besides its class's ``forward``, in words."""
    if "forward" in module.__dict__ and wrapped(module):
        return "its forward is wrapped or replaced"
    # Whoever replaces the call of all modules looks at them, as a hook for all modules does.
    own = type(module).__call__ is not nn.Module.__call__ or compiled_alone(module)
    return "its calls are wrapped or replaced" if own else WATCHED


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """GELU (tanh) of ``linear(x)`` in one kernel, rounded once (cuBLASLt's epilogue): ``x``
    [..., D] -> [..., inner dim].
    """
    assert addmm_activation is not None
    rows = addmm_activation(linear.bias, x.reshape(-1, linear.in_features), linear.weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], linear.out_features)


def fits_epilogue(linear: nn.Module, x: Tensor, approximate: object) -> TypeGuard[nn.Linear]:
    """Whether :func:`linear_gelu` may stand for a linear layer and its GELU: a plain ``nn.Linear``
    in half precision on a GPU, and no backward pass.
    """
    return (
        addmm_activation is not None
        and approximate == "tanh"
        and type(linear) is nn.Linear
        and x.is_cuda
        and not transformed()
        and _seen_by_linear_alone(linear, x)
        and type(linear.weight) is nn.Parameter
        and linear.bias is not None
        and x.dtype in HALVES
        and x.dtype == linear.weight.dtype == linear.bias.dtype
        and not (torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad or linear.bias.requires_grad))
        and not autocasts(x)
    )


def _gelu_in_place(linear: nn.Module, x: Tensor, approximate: Any) -> Tensor | None:
    """GELU of ``x``, which ``linear`` has just returned, written over it. Where ``x`` wants a
    gradient, that is written over it instead. None where somebody else can hold ``x``.
    """
    if torch.compiler.is_compiling() or not _seen_by_linear_alone(linear, x):  # the compiler reuses memory by itself
        return None
    if not x.requires_grad:
        return torch.ops.aten.gelu_(x, approximate=approximate)
    if not torch.is_grad_enabled() or saves_through_hooks() or transformed():
        return None
    apply = _GradientInPlace.apply if outlived_transform(x) else _apply
    result: Tensor = apply(x, approximate)
    return result


class _GradientInPlace(torch.autograd.Function):
    """GELU of a tensor that nobody but autograd holds. A backward pass that no other can follow
    writes the gradient over that tensor, which would otherwise be alive beside both gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(x)
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if graph_is_kept() or torch.is_grad_enabled() or transformed() or in_a_batch(dy) or seen_by_a_mode():
            return torch.ops.aten.gelu_backward(dy, x, approximate=ctx.approximate), None
        x = x.detach()
        return torch.ops.aten.gelu_backward.grad_input(dy, x, approximate=ctx.approximate, grad_input=x), None


_apply = without_transforms(_GradientInPlace)


def _seen_by_linear_alone(linear: nn.Module, x: Tensor) -> bool:
    """Whether nobody but the code of ``linear`` sees its input and output, of which ``x`` is one:
    no hook, wrapper, mode or adapter.
    """
    cls = type(linear)
    return (
        type(x) is Tensor
        and (cls.forward is _LINEAR_FORWARD or _quantised(cls.forward))
        and F.linear is _LINEAR
        and called_as_module(linear)
        and not seen_by_a_mode()
    )


def called_as_module(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs its class's ``forward`` and nothing else: no hook, no
    wrapper, nothing compiled.
    """
    call = type(module).__call__
    return (
        (call is module_call or only_traced(call))
        and ("forward" not in module.__dict__ or not wrapped(module))
        and not compiled_alone(module)
        and not (module._forward_hooks or module._forward_pre_hooks or any(hooks_for_all_modules))
        and not (torch.is_grad_enabled() and (module._backward_hooks or module._backward_pre_hooks))
    )


def _why_kept(name: str, linear: nn.Module) -> str | None:
    """Why somebody may keep what ``linear`` returns, so that it mustn't be overwritten, or None.
    ``name``: its name, for users.
    """
    cls = type(linear)
    if not (cls.forward is _LINEAR_FORWARD or _quantised(cls.forward)):
        return f"{full_name(cls)}, its {name}, may keep what it returns"
    if F.linear is not _LINEAR:
        return replaced_functional("linear") or _REPLACED
    return None if called_as_module(linear) else f"{name}: {called_otherwise(linear)}"


def unlike_torchs() -> str | None:
    """What has replaced PyTorch's GELU, in words, or None."""
    return None if F.gelu is _GELU else replaced_functional("gelu") or _REPLACED


def _quantised(forward: Any) -> bool:
    """Whether ``forward`` is that of a quantised linear layer that is known to keep nothing of what
    it returns.
    """
    if forward is LoraLinear.forward:  # it hands on what its base layer returns where no adapter is active
        return False
    return isinstance(forward, FunctionType) and any(defined_in(forward, package) for package in _QUANTISERS)
