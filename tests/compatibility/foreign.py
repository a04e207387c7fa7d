"""Other patchers in the same process: a block whose ``forward`` somebody replaced, wrappers around
blocks, cache-dit.
"""

from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from .feature import Feature, halved, its_output
from .offload import blocks_of

_STUCK = "nothing was unpatched: .*its forward was replaced by"


def _replace_forward(model: nn.Module, folder: Path) -> nn.Module:
    """As TeaCache forks, token mergers and the like do it, on one block."""
    block = blocks_of(model)[0]
    original = block.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return halved(original(*args, **kwargs))

    block.forward = MethodType(forward, block)  # type: ignore[method-assign]
    return model


def _restore_forward(model: nn.Module) -> nn.Module:
    del blocks_of(model)[0].forward
    return model


class Wrapper(nn.Module):
    """As xDiT wraps blocks: a module in the block's place that hands everything on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return halved(self.module(*args, **kwargs))


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    names = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers")
    return [child for name, child in model.named_children() if name in names]  # type: ignore[misc]


def _wrap_blocks(model: nn.Module, folder: Path) -> nn.Module:
    for blocks in _lists(model):
        for i, block in enumerate(blocks):
            blocks[i] = Wrapper(block)
    return model


def _unwrap_blocks(model: nn.Module) -> nn.Module:
    for blocks in _lists(model):
        for i, wrapper in enumerate(blocks):
            blocks[i] = wrapper.module
    return model


FEATURES = (
    Feature(
        "the `forward` of a block replaced on the instance",
        _replace_forward,
        its_output,
        _restore_forward,
        refused="not fused: its forward was replaced by",
        stuck=_STUCK,
        fused="any",
    ),
    Feature("a module wrapped around every block (xDiT)", _wrap_blocks, its_output, _unwrap_blocks),
)
