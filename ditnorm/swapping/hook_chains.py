"""The references to a module's bound ``forward`` that hooks of diffusers and accelerate have
captured.

Such a hook keeps ``module.forward``, the bound method, and puts a wrapper into the instance. A
class swapped afterwards would never be called, so the captured methods are rewritten with it. Where
each library keeps them:

* accelerate: ``module._old_forward``; the wrapper is ``partial(new_forward, module)``
* diffusers: ``forward`` and ``original_forward`` of a ``HookFunctionReference`` that the wrapper
  closes over
* both: ``__wrapped__`` of the wrapper; and ``module.forward`` itself, where the last hook was
  removed
"""

import functools
from collections.abc import Collection
from types import MethodType
from typing import Any

from torch import nn

from .generated import origin_of

Slot = tuple[dict[str, Any], str]


class Untraceable(Exception):
    """Calls of the module end somewhere else than in the ``forward`` of its class; says where."""


def set_class(module: nn.Module, cls: type) -> None:
    """Changes the class of ``module`` and every captured reference to its forward. Raises
    ``Untraceable``, nothing changed.

    Between any two steps a module may be left as it is, by an interrupt, and still runs: one of a
    generated class can run the forward of its origin, not the other way round. So a generated class
    comes before the references to its forward, and goes after them.
    """
    slots = captured(module, of_origin=True)
    forward = MethodType(cls.forward, module)  # type: ignore[attr-defined]
    if origin_of(cls) is not None:
        module.__class__ = cls
    for holder, key in slots:
        holder[key] = forward
    if origin_of(cls) is None:
        module.__class__ = cls


def captured(module: nn.Module, *, of_origin: bool = False) -> list[Slot]:
    """Where the bound ``forward`` of ``module`` is held, found by following its calls from the
    instance on.

    ``of_origin``: also where a module of a generated class has its origin's forward, which an
    interrupted :func:`set_class` leaves. Raises ``Untraceable`` where calls end somewhere else, and
    where a hook isn't built as those of the known releases are.
    """
    own = {type(module).forward}
    origin = origin_of(type(module))
    if of_origin and origin is not None:
        own.add(origin.forward)  # type: ignore[attr-defined]
    slots: list[Slot] = []
    pending: list[Slot] = [(module.__dict__, "forward")] if "forward" in module.__dict__ else []
    visited = set()
    while pending:
        holder, key = pending.pop()
        if (id(holder), key) in visited:
            continue
        visited.add((id(holder), key))
        if _is_bound(holder[key], module, own):
            slots.append((holder, key))
            continue
        pending += _next(holder[key], module)
        wrapper: dict[str, Any] = vars(holder[key])  # type: ignore[assignment]
        if _is_bound(wrapper.get("__wrapped__"), module, own):
            slots.append((wrapper, "__wrapped__"))
    return slots


def untraceable(module: nn.Module, *, of_origin: bool = False) -> str | None:
    """Where calls of ``module`` end, if :func:`captured` can't follow them; else None."""
    try:
        captured(module, of_origin=of_origin)
    except Untraceable as error:
        return str(error)
    return None


def _is_bound(value: Any, module: nn.Module, functions: Collection[Any]) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ in functions


def wrapped(module: Any) -> bool:
    """Whether something stands between a call of ``module``, whose instance has a forward, and that
    of its class. Hooks leave the latter in the instance when the last of them is removed.
    """
    return not _is_bound(module.__dict__["forward"], module, (type(module).forward,))


def _next(value: Any, module: nn.Module) -> list[Slot]:
    """What the wrapper of a hook calls."""
    called = _module_called(value)
    if called not in (None, module):  # seen after deepcopy: wrappers of the copy still close over the hooks of the original
        raise Untraceable(f"its forward calls another module, a {type(called).__name__}")
    if not isinstance(value, functools.partial) or called is None:
        raise Untraceable(f"its forward was replaced by {_describe(value)}")
    source = getattr(value.func, "__module__", None)
    if source == "accelerate.hooks":
        return [_slot(module.__dict__, "_old_forward", "accelerate")]
    if source == "diffusers.hooks.hooks":
        return _diffusers_next(value, module)
    raise Untraceable(f"its forward was wrapped by {_describe(value.func)}")


def _diffusers_next(wrapper: functools.partial[Any], module: nn.Module) -> list[Slot]:
    held = _function_reference(wrapper.func)
    original = _slot(held, "original_forward", "diffusers")
    forward = _slot(held, "forward", "diffusers")
    if held["original_forward"] is None:
        return [forward]
    # A hook with a new_forward of its own calls original_forward. HookRegistry.remove_hook of the
    # hook below overwrites `forward`.
    return [original] if _is_new_forward(held["forward"], module) else [original, forward]


def _function_reference(new_forward: Any) -> dict[str, Any]:
    """The attributes of the ``HookFunctionReference`` that the wrapper of a hook of diffusers
    closes over; empty if there is none.
    """
    for cell in getattr(new_forward, "__closure__", None) or ():
        try:
            held: dict[str, Any] = vars(cell.cell_contents)
        except (ValueError, TypeError):  # an empty cell; a value without attributes
            continue
        if "original_forward" in held:
            return held
    return {}


def _slot(holder: dict[str, Any], key: str, library: str) -> Slot:
    if key not in holder:
        raise Untraceable(f"its forward is wrapped by a hook of {library} without {key!r}, of a release that ditnorm doesn't know")
    return holder, key


def _is_new_forward(value: Any, module: nn.Module) -> bool:
    return isinstance(value, functools.partial) and value.args == (module,) and getattr(value.func, "__name__", None) == "new_forward"


def _module_called(value: Any) -> nn.Module | None:
    """The module that a bound method or the wrapper of a hook works on."""
    first = value.args[0] if isinstance(value, functools.partial) and value.args else getattr(value, "__self__", None)
    return first if isinstance(first, nn.Module) else None


def _describe(value: Any) -> str:
    name = getattr(value, "__qualname__", type(value).__name__)
    return f"{getattr(value, '__module__', type(value).__module__)}.{name}"


_MOVING = {
    "accelerate.hooks": frozenset({"AlignDevicesHook", "CpuOffload", "LayerwiseCastingHook"}),
    "diffusers.hooks.group_offloading": frozenset({"GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook", "LayerExecutionTrackerHook"}),
    "diffusers.hooks.layerwise_casting": frozenset({"LayerwiseCastingHook"}),
}
"""The hooks that change where weights are, or in which dtype, and look at no value."""


def only_moves_weights(module: nn.Module) -> bool:
    """Whether calls of ``module``, whose instance has a forward, end in that of its class, with
    hooks between that only move weights.
    """
    value = module.__dict__["forward"]
    for _ in range(_LONGEST_CHAIN):
        if _is_bound(value, module, (type(module).forward,)):
            return True
        try:
            hook, holder, key = _hook(value, module)
        except (Untraceable, LookupError, AttributeError):
            return False
        if not _moves(hook):
            return False
        value = holder[key]
    return False


def group_offloading(module: nn.Module) -> Any:
    """The hook by which diffusers moves the weights of a group that begins at ``module``; None
    where there is none.
    """
    registry = module.__dict__.get("_diffusers_hook")
    return getattr(registry, "hooks", {}).get("group_offloading")


_LONGEST_CHAIN = 16


def _hook(wrapper: Any, module: nn.Module) -> tuple[Any, dict[str, Any], str]:
    """The hook behind a wrapper, and where what it calls is held."""
    holder, key = _next(wrapper, module)[0]
    if key == "_old_forward":
        return module.__dict__["_hf_hook"], holder, key
    return holder["pre_forward"].__self__, holder, key


def _moves(hook: Any) -> bool:
    cls = type(hook)
    if cls.__name__ == "SequentialHook" and cls.__module__ == "accelerate.hooks":
        return all(map(_moves, hook.hooks))
    return cls.__name__ in _MOVING.get(cls.__module__, ())
