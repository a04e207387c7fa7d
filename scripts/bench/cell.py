"""What a benchmark measures: a call at one size."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Inputs = Mapping[str, Any]
"""The arguments of one call that hold tensors, by the names of ``ditnorm.functional``."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPS = 1e-6


class Cell(Protocol):
    """One call at one size: a frozen dataclass whose fields stand in the JSON."""

    @property
    def name(self) -> str:
        """A readable identifier, which ``--cells`` matches."""

    @property
    def bytes(self) -> int:
        """Bytes that a call has to move: each operand once."""

    @property
    def streams(self) -> tuple[int, int, int]:
        """Reads, writes and bytes of a stream: the plain copy whose time is the speed of light."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile takes part."""

    @property
    def autotune(self) -> bool:
        """Whether torch.compile's max-autotune takes part."""

    def inputs(self, device: str = "cuda") -> Inputs:
        """Random arguments of one call."""


class StreamingCell:
    """What cells share whose calls move their streams and nothing else worth counting."""

    compiled = True
    autotune = False

    @property
    def streams(self) -> tuple[int, int, int]:
        """As of :class:`Cell`."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """As of :class:`Cell`."""
        reads, writes, size = self.streams
        return (reads + writes) * size


C = TypeVar("C", bound=Cell)


def tensors(value: Any) -> list[Tensor]:
    """Those among the inputs or the results of a call."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
