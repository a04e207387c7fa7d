"""How PyTorch runs: waiting for the GPU, compiled blocks, and float32 without TF32."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def synchronize() -> None:
    """Waits for the GPU, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free() -> None:
    """Gives back the memory of models that are no longer in use."""
    torch.compiler.reset()  # what was compiled holds on to its model
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def full_float32() -> Iterator[None]:
    """While it lasts, no float32 product on the GPU is rounded to TF32, as those of convolutions
    are by default.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, before in zip(backends, allowed, strict=True):
            backend.allow_tf32 = before


def compile_blocks(model: Any) -> None:
    """Compiles the repeated blocks of a diffusers model: by ``compile_repeated_blocks``, or, where
    diffusers doesn't say which they are (SD3), those that are not to be split over devices.
    """
    if model._repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True)
        return
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            module.compile(fullgraph=True)


def forget_compiled(model: nn.Module) -> None:
    """Undoes :func:`compile_blocks`."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch.compiler.reset()
