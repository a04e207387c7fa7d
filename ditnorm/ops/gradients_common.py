"""What the formulas of gradients share: the kernels that make those of rows, and PyTorch's
operations that make those that are sums over rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Tensors, kernel_of
from .table import OPS


def maker(name: str) -> Callable[..., Any]:
    """The op ``name``, which makes gradients. Where these are to be differentiated in turn, its
    reference.
    """
    return _expression(name) if torch.is_grad_enabled() else kernel_of(name)


def _expression(name: str) -> Callable[..., Any]:
    op = OPS[name]
    return lambda *arguments: op.reference(op.named(arguments))


Paths = list[tuple[Tensor, Tensor]]
"""Tensors as large as an op's result that it is made of, each with the gradient that reaches it."""


def sums_over_rows(paths: Callable[[Tensors], Paths], tensors: Tensors, places: Sequence[int | None], needed: Sequence[bool]) -> Tensors:
    """The gradients of the tensors at ``places``, each a sum over rows of what reaches the tensor
    through ``paths``. None for the place None, and where ``needed`` says that none is wanted.
    """
    wanted = [place for place, need in zip(places, needed, strict=True) if need and place is not None and tensors[place] is not None]
    if not wanted:
        return (None,) * len(places)
    # Kept tensors have their history, which a second differentiation goes through.
    twice = torch.is_grad_enabled()
    inputs: Tensors = tuple(
        t if t is None else t.view_as(t) if twice else _leaf(t, place in wanted)  # one tensor may stand at two places
        for place, t in enumerate(tensors)
    )
    with torch.enable_grad():
        reached = [(result, grad) for result, grad in paths(inputs) if result.requires_grad]
    outputs, cotangents = [result for result, _ in reached], [grad for _, grad in reached]
    found = torch.autograd.grad(outputs, [inputs[place] for place in wanted], cotangents, create_graph=twice, allow_unused=True)
    of = dict(zip(wanted, found, strict=True))
    return tuple(None if place is None else of.get(place) for place in places)


def _leaf(t: Tensor, wanted: bool) -> Tensor:
    """``t`` without its history. What has none is left alone: no view is made of a gradient that is
    one of a batch (``is_grads_batched``).
    """
    return t.detach().requires_grad_(wanted) if wanted or t.requires_grad else t


def keep_two(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    """What an op keeps whose first two tensors are its rows: everything."""
    return tensors[:2], tensors[2:]


def first_two(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    """The rows of an op whose first two tensors are these, and the rest."""
    return tensors[:2], tensors[2:]
