"""The ways in which a model is run: one entry each, made of changes that are undone afterwards."""

import os
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from common.execution import compile_blocks, forget_compiled
from torch import nn

import ditnorm

Change = Callable[[nn.Module], AbstractContextManager[None]]
"""What makes a variant of a model, for as long as the context lasts."""


@dataclass(frozen=True)
class Variant:
    """One way of running a model: a column of the tables and a bar of the chart."""

    name: str
    colour: str
    changes: Sequence[Change] = ()
    """Made in this order, undone in the other."""
    exact: bool = False
    """Whether its latents must equal those of eager bit for bit."""
    quick: bool = False
    """Whether ``--quick`` measures it."""
    accuracy: bool = False
    """Whether ``--accuracy`` measures how far it is from float32."""

    @property
    def compiled(self) -> bool:
        """Whether it needs a compiler."""
        return compiling in self.changes

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, ``model`` is this variant."""
        with ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(change(model))
            yield


@contextmanager
def patching(model: nn.Module, rounding: str = "eager") -> Iterator[None]:
    """Ditnorm's one line."""
    ditnorm.patch_model(model, strict=True, rounding=rounding)
    try:
        yield
    finally:
        ditnorm.unpatch_model(model)


@contextmanager
def compiling(model: nn.Module) -> Iterator[None]:
    """Inductor finds nothing compiled before, so that the first step shows the whole wait."""
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        compile_blocks(model)
        try:
            yield
        finally:
            forget_compiled(model)


EAGER = Variant("eager", "#9aa0a6", quick=True, accuracy=True)
PATCHED = Variant("patched", "#1a73e8", (patching,), exact=True, quick=True, accuracy=True)
SINGLE = Variant("patched, single", "#8ab4f8", (partial(patching, rounding="single"),), accuracy=True)
VARIANTS = (
    EAGER,  # first: the others are compared with it
    PATCHED,
    SINGLE,
    Variant("compiled", "#f2a600", (compiling,), accuracy=True),
    Variant("patched + compiled", "#137333", (patching, compiling)),
)
