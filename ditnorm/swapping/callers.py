"""Who called a module."""

import inspect
import sys
from collections.abc import Container
from types import FrameType
from typing import Any

from torch import nn

from .fingerprint import fingerprint
from .generated import origin_of
from .torch_private import frame_of_a_call

_BETWEEN = ("torch.nn.modules.module", "accelerate.hooks", "diffusers.hooks.")
_DEPTH = 64


def caller_of(module: nn.Module, forwards: Container[str]) -> nn.Module | None:
    """The module whose forward called ``module``, whose forward runs now; None unless that forward
    has one of these fingerprints.

    What a module returns is taken by the code that called it, which needn't be in the module that
    holds it: libraries give models forwards of their own, on the instance or the class, before or
    after anybody has looked. So the frames are asked.
    """
    frame: FrameType | None = sys._getframe(1)
    called = False
    for _ in range(_DEPTH):
        if frame is None:
            return None
        called = called or (frame.f_code is frame_of_a_call and frame.f_locals["self"] is module)
        if called and not frame.f_globals.get("__name__", "").startswith(_BETWEEN):
            return _running(frame, forwards)
        frame = frame.f_back
    return None


def _running(frame: FrameType, forwards: Container[str]) -> nn.Module | None:
    """The module whose forward runs in ``frame``."""
    code, outer = frame.f_code, frame.f_back
    for _ in range(_DEPTH):
        if outer is None:
            return None
        if outer.f_code is frame_of_a_call:
            holder: Any = outer.f_locals["self"]
            upstream: Any = origin_of(type(holder)) or type(holder)
            forward = inspect.unwrap(upstream.forward)
            known = getattr(forward, "__code__", None) is code and fingerprint(forward) in forwards
            return holder if known else None
        outer = outer.f_back
    return None
