"""Which of a test's models the default run takes."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(kept: Iterable[str], names: Iterable[str]) -> list[Any]:
    """``names`` to parametrise a test by, all but ``kept`` marked slow."""
    kept = set(kept)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
