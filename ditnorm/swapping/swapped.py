"""What a swapped module asks in its calls: whether upstream's class still is what was looked at,
and whether somebody watches the module.

Both are asked so often that they only compare objects; reading source, or following the wrappers of
hooks, is left to where a comparison fails.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.nn import Module

from .hook_chains import only_moves_weights
from .originals import function_of
from .torch_private import asked_once, hooks_for_all_modules, module_call, only_traced, traced_as

_forward_hooks, _forward_pre_hooks, _backward_hooks, _backward_pre_hooks = hooks_for_all_modules


class Swapped:
    """What goes in front of an upstream class: a body, or a layer."""

    origin: ClassVar[Any] = None
    """The upstream class; set on the generated class. None: it stands in front of none, as a layer
    that users make.
    """
    known_forward: ClassVar[Any] = None
    """Its forward when it was last looked at, if that was one to stand in for."""
    function: ClassVar[Any] = None
    """The name of the function of ``torch.nn.functional`` that this forward calls, if it is a
    norm's.
    """
    known_function: ClassVar[Any] = None
    """What ``torch.nn.functional`` had under that name when the forward was last looked at."""
    own_forward: ClassVar[Any]
    """This class's own forward, as it was defined."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        generated = "origin" in cls.__dict__
        if generated or cls.origin is None:  # not where others derive a class from a generated one
            cls.own_forward = getattr(cls, "forward", None)
        if generated:
            cls._look()

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether this class may stand in for ``upstream``, going by what is in it now."""
        raise NotImplementedError

    @classmethod
    @asked_once
    def as_made(cls) -> bool:
        """Whether the class and the upstream class run what they ran when this one was made. Others
        replace methods of classes, and torch's functions, for the whole process.
        """
        if cls.forward is not cls.own_forward:  # type: ignore[attr-defined]
            return False
        origin, function = cls.origin, cls.known_function
        same = origin is None or (origin.forward is cls.known_forward and (function is None or getattr(F, cls.function) is function))
        return same or cls._look()

    @asked_once
    def only_moves_weights_now(self) -> bool:
        """Whether what wraps the forward of this instance, if anything does, moves weights only."""
        return only_moves_weights(self)  # type: ignore[arg-type]  # a module, whose class this stands in front of

    @classmethod
    def _look(cls) -> bool:
        if torch.compiler.is_compiling() or not cls.knows(cls.origin):
            return False
        cls.known_forward, cls.function = cls.origin.forward, function_of(cls.origin)
        cls.known_function = None if cls.function is None else getattr(F, cls.function)
        return True


@asked_once
def _all_watched() -> bool:
    """Whether somebody sees all modules. Dynamo itself guards on the hooks for all modules."""
    hooked = _forward_hooks or _forward_pre_hooks or _backward_hooks or _backward_pre_hooks
    return bool(hooked) or (Module.__call__ is not module_call and not only_traced(Module.__call__))


def _traced_untouched(*modules: Any) -> bool:
    """:func:`untouched`, as Dynamo traces it: classes and the hooks for all modules are asked once,
    and PyTorch's functions read for Dynamo to guard on them.
    """
    if _all_watched() or F.layer_norm is None or F.rms_norm is None:
        return False
    for module in modules:
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return False
        if torch.is_grad_enabled() and (state["_backward_hooks"] or state["_backward_pre_hooks"]):
            return False
        if isinstance(module, Swapped):
            if ("forward" in state and not module.only_moves_weights_now()) or not module.as_made():
                return False
        elif "forward" in state and not only_moves_weights(module):
            return False
    return True


@traced_as(_traced_untouched)
def untouched(*modules: Any) -> bool:
    """Whether nobody but callers and bodies (or upstream's classes) sees what goes into ``modules``
    and comes out of them.

    Somebody does where there are hooks, on a module or for all modules, or where somebody has
    replaced a forward, of an instance or a class. Hooks that only move or cast weights don't count.
    Nor do hooks on the backward pass where there is none, nor does the tracer of an export.
    """
    if _forward_hooks or _forward_pre_hooks or _backward_hooks or _backward_pre_hooks:
        return False
    if Module.__call__ is not module_call and not only_traced(Module.__call__):
        return False
    grad, seen = torch.is_grad_enabled(), None
    for module in modules:
        state = module.__dict__  # its entries take a third of the time of attributes of a module
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or (grad and (state["_backward_hooks"] or state["_backward_pre_hooks"])):
            return False
        if "forward" in state and not only_moves_weights(module):
            return False
        cls = type(module)
        if cls is not seen and issubclass(cls, Swapped) and not cls.as_made():
            return False
        seen = cls
    return True
