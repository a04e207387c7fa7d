"""Whether torch's functions are still torch's own: libraries replace them for the whole process.

Their fingerprints would change with releases of torch that change nothing. So a function counts as
torch's where its code comes from the file that defines it, under its own name; a wrapper may copy
the name of what it wraps, but not that.
"""

from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import nn


def full_name(cls: type) -> str:
    """A class with its module, for messages and to compare."""
    return f"{cls.__module__}.{cls.__qualname__}"


def replaced(cls: type, method: str) -> str | None:
    """What stands in the place of a method that ``cls``, a class of torch, defines; None where it
    is torch's own.
    """
    return _replaced(f"{full_name(cls)}.{method}", vars(cls).get(method), f"{cls.__qualname__}.{method}", cls.__module__)


def function_of(norm: type) -> str | None:
    """The function of ``torch.nn.functional`` that computes a norm of torch's kinds; None for other
    classes.
    """
    if issubclass(norm, nn.LayerNorm):
        return "layer_norm"
    return "rms_norm" if issubclass(norm, nn.RMSNorm) else None


def replaced_functional(name: str) -> str | None:
    """What stands in the place of a function of ``torch.nn.functional``; None where it is torch's
    own.
    """
    return _replaced(f"torch.nn.functional.{name}", getattr(F, name), name, "torch.nn.functional")


def _replaced(path: str, found: Any, qualname: str, module: str) -> str | None:
    if isinstance(found, BuiltinFunctionType) and found.__name__ == qualname:
        return None
    if isinstance(found, FunctionType) and found.__qualname__ == qualname and _is_of(found, f"{module.replace('.', '/')}.py"):
        return None
    return f"{path} was replaced by {getattr(found, '__module__', None)}.{getattr(found, '__qualname__', type(found).__name__)}"


def defined_in(function: FunctionType, package: str) -> bool:
    """Whether the code of ``function``, and not of something that wraps it, comes from a
    package.
    """
    module = function.__module__
    return module.partition(".")[0] == package and _is_of(function, f"{module.replace('.', '/')}.py")


def _is_of(function: FunctionType, file: str) -> bool:
    code = function.__code__
    return code.co_name == function.__name__ and code.co_filename.replace("\\", "/").endswith(file)
