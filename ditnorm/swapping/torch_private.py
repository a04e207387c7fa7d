"""PyTorch's private names that this package uses, and what stands in for each where a release no
longer has it.

All stand-ins are correct, if slower: what can't be asked is taken for true, and PyTorch's own
operations serve the call. Nothing else in the package names them. (``nn.Module`` keeps its hooks
and sub-modules in ``_forward_hooks``, ``_forward_pre_hooks`` and ``_modules``; its pickles contain
those names, so they stay.)
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad
import torch.fx
import torch.overrides
import torch.utils._device
from torch.nn.modules import module as _module

F = TypeVar("F", bound=Callable[..., Any])
Q = TypeVar("Q", bound=Callable[..., bool])


class _Unknown:
    """In the place of what holds a private name: forward-mode gradients may be on, and a program
    may be on its way into an export.
    """

    _current_level = 0
    _is_exporting_flag = True


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


def _found(holder: Any, name: str) -> Any:
    return holder if hasattr(holder, name) else _Unknown


any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _yes)
"""Whether autocast is on for any device, in a sixth of the time that
``torch.is_autocast_enabled(x.device.type)`` takes. Without it each call asks for the devices of its
tensors.
"""

forward_ad: Any = _found(torch.autograd.forward_ad, "_current_level")
"""Holder of ``_current_level``: 0 or more where forward-mode gradients are on. Without it every
call runs in PyTorch's operations.
"""

compiler: Any = _found(torch.compiler, "_is_exporting_flag")
"""Holder of ``_is_exporting_flag``, true while torch.export traces. ``torch.compiler.is_exporting``
asks it, but Dynamo takes that function for true up to PyTorch 2.11 at least. Without it a compiled
training step differentiates PyTorch's operations.
"""

addmm_activation: Callable[..., torch.Tensor] | None = getattr(torch, "_addmm_activation", None)
"""A linear with its GELU in one kernel (cuBLASLt's epilogue). Without it there are two."""

scaled_mm: Any = getattr(torch, "_scaled_mm", None)
int_mm: Any = getattr(torch, "_int_mm", None)
"""Products of float8 and of int8 matrices. Without them torchao serves its weights."""

hooks_for_all_modules: tuple[Mapping[int, Any], ...] = tuple(
    getattr(_module, f"_global_{kind}_hooks", {0: "unknown"}) for kind in ("forward", "forward_pre", "backward", "backward_pre")
)
"""What ``register_module_forward_hook`` and its like added; PyTorch changes these, and never puts
others in their place. Where one can't be seen: something.
"""

module_call: Any = getattr(torch.nn.Module, "_wrapped_call_impl", torch.nn.Module.__call__)
"""PyTorch's own ``nn.Module.__call__``, which tools replace to see all calls. Where it has another
name: the one found at import.
"""

frame_of_a_call: Any = getattr(getattr(torch.nn.Module, "_call_impl", None), "__code__", None)
"""The code of the method that calls a module's forward, whose ``self`` is the module. None: no
frame is.
"""


def compiled_alone(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` was called. Where that can't be seen: yes."""
    return getattr(module, "_compiled_call_impl", _Unknown) is not None


def node_of(function: type[torch.autograd.Function]) -> Any:
    """The class of the nodes that calls of ``function`` make in a graph. None: it isn't known."""
    return getattr(function, "_backward_cls", None)


def without_frame(op: Any) -> Any:
    """An operator's overload without its Python frame: a call takes nine tenths of the time. Dynamo
    can't trace it. Where the frame can't be left out: the overload.
    """
    return getattr(op, "_op", op)


def asked_once(question: Q) -> Q:
    """A method that is asked without arguments, or a function of none, with a bool for an answer.
    Dynamo asks it while it traces, takes the answer for a constant, and guards on nothing that was
    read for it. Where it doesn't know that: it traces the question.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


def traced_as(stand_in: Callable[..., Any]) -> Callable[[F], F]:
    """For a function that Dynamo is to trace as ``stand_in``, which does the same with fewer reads:
    each is a guard that every call of a compiled block checks. Where it doesn't know that: it
    traces the function itself.
    """

    def mark(function: F) -> F:
        function._torchdynamo_inline = stand_in  # type: ignore[attr-defined]
        return function

    return mark


def traced_like(origin: type) -> dict[str, Any]:
    """What a class that stands in for ``origin`` has among its attributes for Dynamo to take its
    modules as it takes those of ``origin``: PyTorch's own need fewer guards.
    """
    return {"_dynamo_marked_static": True} if origin.__module__.startswith("torch.nn.modules.") else {}


def without_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls that ``torch.func`` doesn't transform, of tensors that haven't
    outlived a transform: it asks for neither. Where there is no such: ``function.apply``.
    """
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply


def transformed_or_traced() -> bool:
    """Whether ``torch.func`` transforms the call (vmap, grad, ...), or ``make_fx`` or
    ``torch.jit.trace`` records it. Where that can't be seen: yes.
    """
    return _transform_stack() is not None or _dispatch_mode(_PROXY) is not None or _jit_traces()


def _something(*arguments: Any) -> Any:
    return True


outlived_transform: Callable[[torch.Tensor], bool] = getattr(getattr(torch._C, "_functorch", None), "is_dead_tensor_wrapper", _something)
"""Whether a tensor is one that a function under a transform left behind, with the tensor that it
stands for in it. Where that can't be seen: yes.
"""
in_a_batch: Callable[[torch.Tensor], bool] = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", _something)
"""Whether a gradient is one of several that ``is_grads_batched`` computes at once. Where that can't
be seen: yes.
"""
_transform_stack: Callable[[], Any] = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", _something)
_PROXY: Any = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "PROXY", None)
_jit_traces: Callable[[], bool] = getattr(torch._C, "_is_tracing", _yes)
_dispatch_mode: Callable[[Any], Any] = _something if _PROXY is None else getattr(torch._C, "_get_dispatch_mode", _something)


def only_traced(call: Any) -> bool:
    """Whether ``call``, found in the place of :data:`module_call`, is the wrapper around it by
    which ``torch.export`` and ``make_fx`` note whose operations they record. Where that can't be
    seen: no.
    """
    return getattr(call, "__wrapped__", None) is module_call and getattr(call, "__globals__", None) is _fx


_fx: Any = vars(getattr(torch.fx, "_symbolic_trace", _Unknown))


def seen_by_a_mode() -> bool:
    """Whether a ``TorchDispatchMode`` or ``TorchFunctionMode`` sees the operations, and may keep
    their results: that of ``torch.set_default_device`` doesn't. Where that can't be seen: yes.
    """
    return _dispatch_modes() > 0 or (_function_modes() > 0 and not all(type(mode) is _DeviceContext for mode in _function_mode_stack()))


def _one() -> int:
    return 1


_autograd: Any = getattr(torch._C, "_autograd", None)

graph_is_kept: Callable[[], bool] = getattr(_autograd, "_get_current_graph_task_keep_graph", _yes)
"""In a backward pass, whether another may follow it through the same graph. Where that can't be
seen: yes.
"""
_saved_tensors_hooks: Callable[[bool], Any] = getattr(_autograd, "_top_saved_tensors_default_hooks", _something)


def saves_through_hooks() -> bool:
    """Whether hooks see what autograd saves, and may keep it. Where that can't be seen: yes."""
    return _saved_tensors_hooks(False) is not None


takes_saved_tensors_hooks: Callable[[], bool] = getattr(_autograd, "_saved_tensors_hooks_is_enabled", _no)
"""Whether hooks may be put around what autograd saves. Where that can't be seen: no."""

_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _one)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", _one)
_function_mode_stack: Callable[[], list[Any]] = getattr(torch.overrides, "_get_current_function_mode_stack", lambda: [None])
_DeviceContext: Any = getattr(torch.utils._device, "DeviceContext", None)
