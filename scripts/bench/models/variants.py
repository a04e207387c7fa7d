"""The ways in which a model is run: one entry each, made of changes that are undone afterwards."""

import os
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from common.execution import compile_blocks, forget_compiled
from torch import nn

import ditnorm
from ditnorm.models import MODULATED

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

    def serves(self, model: nn.Module) -> bool:
        """Whether there is something to gain: few models have large modulations."""
        return precomputing not in self.changes or any(type(model).__name__ in facts.names for facts in MODULATED)

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
def precomputing(model: nn.Module) -> Iterator[None]:
    """The weights of modulations off the device; the first step makes the table of 50 steps."""
    ditnorm.precompute_modulation(model, timesteps=torch.arange(1000.0, 950.0, -1.0))
    try:
        yield
    finally:
        ditnorm.restore_modulation(model)


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
PRECOMPUTED = Variant("patched, precomputed", "#12b5cb", (patching, precomputing), exact=True, quick=True)
SINGLE = Variant("patched, single", "#8ab4f8", (partial(patching, rounding="single"),), accuracy=True)
BF16 = Variant("patched, bf16", "#b0bec5", (patching,))
"""Of a quantised model: the same before it was quantised."""
VARIANTS = (
    EAGER,  # first: the others are compared with it
    PATCHED,
    PRECOMPUTED,
    SINGLE,
    Variant("compiled", "#f2a600", (compiling,), accuracy=True),
    Variant("patched + compiled", "#137333", (patching, compiling)),
)
