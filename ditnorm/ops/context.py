"""What stands around a call: autocast, and what records or transforms operations."""

import torch
from torch import Tensor

from ..swapping.torch_private import forward_ad, function_transform, traced_to_graph


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where ``tensor`` is. Of the meta device, which has none, PyTorch
    mustn't be asked.
    """
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def transformed() -> bool:
    """Whether other code than eager PyTorch's stands behind a call: a compiler, a tracer, a
    function transform, forward-mode gradients.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or function_transform()
        or traced_to_graph()
        or forward_ad._current_level >= 0
    )
