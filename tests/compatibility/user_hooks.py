"""PyTorch hooks of the user's own, and norms replaced by other modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from .feature import DEVICE, DTYPE, Feature, halved, its_output
from .offload import blocks_of

_seen: list[Tensor] = []


def _norms(model: nn.Module) -> list[nn.Module]:
    norms = [(name, m) for block in blocks_of(model) for name, m in block.named_modules() if isinstance(m, nn.LayerNorm | RMSNorm)]
    return [m for name, m in norms if not name.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k"))]


def _head_norms(model: nn.Module) -> list[nn.Module]:
    return [m for block in blocks_of(model) for name, m in block.named_modules() if name.endswith(("norm_q", "norm_k"))]


def _record(module: nn.Module, args: Any, output: Tensor) -> None:
    _seen.append(output.detach().clone())


def _what_hooks_saw(target: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """The values that a hook is shown."""
    _seen.clear()
    output = run()
    return output, [t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in _seen]


def _watch(model: nn.Module, folder: Path) -> nn.Module:
    for norm in _norms(model):
        norm.register_forward_hook(_record)
    return model


def _change_norms(model: nn.Module, folder: Path) -> nn.Module:
    for norm in _norms(model)[::2]:
        norm.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


def _change_norm_inputs(model: nn.Module, folder: Path) -> nn.Module:
    for norm in _norms(model)[::2]:
        norm.register_forward_pre_hook(lambda module, args: (args[0] * 0.5 + 1, *args[1:]))
    return model


def _change_head_norms(model: nn.Module, folder: Path) -> nn.Module:
    for norm in _head_norms(model)[::4]:
        norm.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


def _change_blocks(model: nn.Module, folder: Path) -> nn.Module:
    for block in blocks_of(model):
        block.register_forward_hook(lambda module, args, output: halved(output))
    return model


def _change_model(model: nn.Module, folder: Path) -> nn.Module:
    model.register_forward_hook(lambda module, args, output: halved(output))
    return model


def _remove(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


class Damped(nn.LayerNorm):
    """A user's norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class DampedRMS(RMSNorm):
    """The same of diffusers'."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        damped: Tensor = super().forward(hidden_states) * 0.5
        return damped


def _replace_norms(model: nn.Module, folder: Path) -> nn.Module:
    """A norm of every other block becomes a module that ditnorm doesn't know."""
    for block in blocks_of(model)[::2]:
        for parent in block.modules():
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.LayerNorm) and not child.elementwise_affine:
                    setattr(parent, name, Damped(child.normalized_shape, child.eps, elementwise_affine=False))
                elif isinstance(child, RMSNorm) and name in ("ffn_norm1", "norm1"):
                    setattr(parent, name, DampedRMS(child.dim[0], child.eps, elementwise_affine=child.weight is not None))
                    getattr(parent, name).to(DEVICE, DTYPE).load_state_dict(child.state_dict())
    return model


FEATURES = (
    Feature("a forward hook on every norm, looking", _watch, _what_hooks_saw, _remove, fused="any"),
    Feature("a forward hook on norms that changes their output", _change_norms, its_output, _remove, fused="any"),
    Feature("a forward pre-hook on norms that changes their input", _change_norm_inputs, its_output, _remove, fused="any"),
    Feature("a forward hook on norms of queries that changes their output", _change_head_norms, its_output, _remove, fused="some"),
    Feature("a forward hook on every block", _change_blocks, its_output, _remove),
    Feature("a forward hook on the transformer", _change_model, its_output, _remove),
    Feature(
        "norms replaced by a module of the user's",
        _replace_norms,
        its_output,
        fused="some",
        fused_in={"Z-Image": "any", "Lumina2": "any"},  # what one call made, several make
        refused="no fused layer stands in for .*Damped",
    ),
)
