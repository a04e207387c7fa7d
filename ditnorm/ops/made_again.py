"""What a norm returned and an adapter keeps for the gradient of its weight: a tensor as large as
the stream, in every block. The norm keeps what it was made of anyway, so the backward pass makes it
again, with the same kernel.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..swapping.torch_private import node_of, saves_through_hooks, takes_saved_tensors_hooks
from .autograd import Fused, Tensors, changed_in_place, kept_by, kernel_of
from .calls import NormScaleShift
from .context import transformed
from .gradients_norm import GRADIENTS

_NORM = "norm_scale_shift"
_NODE: Any = node_of(Fused)
_WEIGHT = NormScaleShift._fields.index("weight")


class MadeAgain:
    """The result of a norm, for all who read it in a forward pass. It lives as long as one of these
    may have to make a gradient.
    """

    def __init__(self, y: Tensor, made_of: Tensors, codes: Tensors) -> None:
        self.place, self.size = y.data_ptr(), y.numel()
        self.made_of, self.codes, self.versions = made_of, codes, _versions(made_of)
        self.readers = self.waiting = 0
        self.y: Tensor | None = None
        self.stream: object = None

    def read_by(self, linear: nn.Linear, y: Tensor) -> Any:
        """``linear(y)``, which keeps nothing of y."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return linear(y)

    def _pack(self, t: Tensor) -> Any:
        if t.numel() != self.size or t.data_ptr() != self.place or t._version != 0 or not t.is_contiguous():
            return t, t._version  # a hook may have written to y
        self.readers += 1
        return t.shape

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, torch.Size):
            kept, version = packed
            if kept._version != version:
                raise changed_in_place()
            return kept
        stream, y = self.made_of[0].is_cuda and torch.cuda.current_stream(self.made_of[0].device), self.y
        if y is None or stream != self.stream:
            if _versions(self.made_of) != self.versions:
                raise changed_in_place()
            with torch.no_grad():
                y = kernel_of(_NORM)(*self.made_of, *self.codes)
            self.y, self.stream, self.waiting = y, stream, self.readers
        self.waiting -= 1
        if self.waiting == 0:
            self.y = None
        return y.view(packed)


def made_again(y: Tensor, reader: nn.Module) -> MadeAgain | None:
    """For what :func:`ditnorm.functional.norm_scale_shift` returned and a linear layer reads. None
    for all else, where others see what autograd saves, and for a norm with a weight of its own,
    which FSDP may have taken away when the reader's gradient is made.
    """
    if type(y) is not Tensor or type(reader) is not nn.Linear or not torch.is_grad_enabled() or transformed():
        return None
    norm: Any = y.grad_fn
    if type(norm) is not _NODE or norm.gradients is not GRADIENTS[_NORM] or y._version != 0:
        return None
    if saves_through_hooks() or not takes_saved_tensors_hooks():
        return None
    known: Any = getattr(norm, "made_again", None)
    found: MadeAgain | None = None if known is None else known()
    if found is None:
        try:
            made_of = kept_by(norm)
        except RuntimeError:  # gone with a backward pass, or changed since: what can't be made again is kept
            return None
        if made_of[_WEIGHT] is not None or any(t is not None and t.is_inference() for t in made_of):
            return None
        found = MadeAgain(y, tuple(None if t is None else t.detach() for t in made_of), norm.codes)
        norm.made_again = weakref.ref(found)
    return found


def _versions(tensors: Tensors) -> int:
    return sum(t._version for t in tensors if t is not None)
