"""Who takes part in a benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cell import Inputs

SINGLE, EAGER = "ditnorm single", "ditnorm eager"
UNFUSED, COMPILED, AUTOTUNED = "eager", "torch.compile", "max-autotune"
OURS = (SINGLE, EAGER)
# Not with its own CUDA graphs: every contestant is captured in ours.
COMPILE_MODES = {COMPILED: None, AUTOTUNED: "max-autotune-no-cudagraphs"}

Call = Callable[[], Any]
"""A call without arguments. It returns what the function of ``ditnorm.functional`` does."""

Maker = Callable[[Inputs], Call | None]
"""Makes the call of a set of inputs; None where the contestant doesn't serve the cell."""

Binding = Callable[[Any], Maker]
"""For a cell, what makes its calls."""


@dataclass(frozen=True)
class Contestant:
    """One way of computing the ops."""

    name: str
    bind: Binding


def nothing(inputs: Inputs) -> None:
    """The maker of a contestant that doesn't serve the cell."""
    return None
