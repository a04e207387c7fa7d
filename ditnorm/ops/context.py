"""What stands around a call: autocast, and what records or transforms operations."""

import torch
from torch import Tensor

from ..swapping.torch_private import forward_ad, transformed_or_traced

_is_compiling = torch.compiler.is_compiling


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where ``tensor`` is. Of the meta device, which has none, PyTorch
    mustn't be asked.
    """
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def transformed() -> bool:
    """Whether other code than eager PyTorch's stands behind a call: a compiler, a tracer, a
    function transform, forward-mode gradients.
    """
    return _is_compiling() or transformed_or_traced() or forward_ad._current_level >= 0
