"""What a norm returned and an adapter keeps for the gradient of its weight: a tensor as large as
the stream, in every block. The norm keeps what it was made of anyway, so the backward pass makes it
again, with the same kernel.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..swapping.torch_private import saves_through_hooks, takes_saved_tensors_hooks
from .autograd import Fused, kept_by, kernel_of
from .context import transformed
from .gradients_norm import GRADIENTS

_NORM = "norm_scale_shift"
_NODE: Any = Fused._backward_cls


class MadeAgain:
    """The result of a norm, for all who read it in a forward pass. The norm's node has it, and
    lives as long as the readers' nodes, whose gradients go there.
    """

    def __init__(self, norm: Any, y: Tensor) -> None:
        self.norm, self.place, self.size = weakref.ref(norm), y.data_ptr(), y.numel()
        self.readers = self.waiting = 0
        self.y: Tensor | None = None

    def read_by(self, module: Callable[[Any], Any], y: Tensor) -> Any:
        """``module(y)``, which keeps nothing of it."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return module(y)

    def _pack(self, t: Tensor) -> Any:
        if t.data_ptr() != self.place or t.numel() != self.size or not t.is_contiguous():
            return t
        self.readers += 1
        return t.shape

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, torch.Size):
            return packed
        y: Any = self.y
        if y is None:
            norm: Any = self.norm()
            with torch.no_grad():
                y = self.y = kernel_of(_NORM)(*kept_by(norm), *norm.codes)
            self.waiting = self.readers
        self.waiting -= 1
        if self.waiting == 0:
            self.y = None
        return y.view(packed)


def made_again(y: Tensor) -> MadeAgain | None:
    """For what :func:`ditnorm.functional.norm_scale_shift` returned. None for all else, and where
    others see what autograd saves.
    """
    if type(y) is not Tensor or not torch.is_grad_enabled() or transformed():
        return None
    norm: Any = y.grad_fn
    if type(norm) is not _NODE or norm.gradients is not GRADIENTS[_NORM] or y._version != 0:
        return None
    if saves_through_hooks() or not takes_saved_tensors_hooks():
        return None
    found: MadeAgain | None = getattr(norm, "made_again", None)
    if found is None:
        norm.made_again = found = MadeAgain(norm, y)
    return found
