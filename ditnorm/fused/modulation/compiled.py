"""The look-up of row numbers as an op, for compiled code."""

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from .schedules import Inputs


class LooksUp(Protocol):
    """A table, as the op sees it."""

    def rows_for_compiled(self, embedding: Tensor, inputs: Inputs, output: int) -> Tensor:
        """New int64 [B] for ``embedding`` [B, D]."""


_handles = itertools.count()
_tables: "weakref.WeakValueDictionary[int, LooksUp]" = weakref.WeakValueDictionary()


def handle_of(table: LooksUp) -> int:
    """A number by which ``torch.ops.ditnorm.modulation_rows`` finds ``table`` while it lives."""
    handle = next(_handles)
    _tables[handle] = table
    return handle


def _rows(embedding: Tensor, inputs: list[Tensor | None], output: int, handle: int) -> Tensor:
    return _tables[handle].rows_for_compiled(embedding, inputs, output)


def _rows_fake(embedding: Tensor, inputs: list[Tensor | None], output: int, handle: int) -> Tensor:
    return embedding.new_empty(embedding.shape[0], dtype=torch.int64)


# It reads the embedding's bits: Inductor's graphs end before it and begin after it.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)

_library = torch.library.Library("ditnorm", "FRAGMENT")
_library.define("modulation_rows(Tensor embedding, Tensor?[] inputs, int output, int handle) -> Tensor", tags=_TAGS)
_library.impl("modulation_rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("ditnorm::modulation_rows", _rows_fake, lib=_library)
