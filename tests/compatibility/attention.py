"""How attention is computed: fused projections, backends, processors."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention
from support import tiny
from torch import nn

from .feature import DEVICE, DTYPE, Feature, calls_of, halved, its_output, linears_called, without


class Scaled:
    """A user's processor: another one's output, scaled."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.processor(*args, **kwargs)
        return halved(output)


def _attentions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Attention | AttentionModuleMixin)]


def _fuse_projections(model: nn.Module, folder: Path) -> nn.Module:
    model.fuse_qkv_projections()  # type: ignore[operator]
    return model


def _unfuse_projections(model: nn.Module) -> nn.Module:
    model.unfuse_qkv_projections()  # type: ignore[operator]
    return model


def _set_processors(model: nn.Module, folder: Path) -> nn.Module:
    for attention in _attentions(model):
        attention.set_processor(Scaled(attention.processor))
    return model


def _reset_processors(model: nn.Module) -> nn.Module:
    for attention in _attentions(model):
        attention.set_processor(attention.processor.processor)
    return model


def _backend(name: str) -> Any:
    def apply(model: nn.Module, folder: Path) -> nn.Module:
        model.set_attention_backend(name)  # type: ignore[operator]
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)  # the call above also changes the whole process
        return model

    return apply


def _default_backend(model: nn.Module) -> nn.Module:
    model.reset_attention_backend()  # type: ignore[operator]
    return model


FEATURES = (
    Feature(
        "`set_attn_processor`",
        _set_processors,
        its_output,
        _reset_processors,
        fused="some",
        refused=r"not fused: its processor compatibility\.attention\.Scaled is not one that ditnorm knows",
    ),
    Feature(
        "`fuse_qkv_projections`, `unfuse_qkv_projections`",
        _fuse_projections,
        linears_called,
        _unfuse_projections,
        families=("FLUX.1", "Wan"),
        note="upstream's attention processors of the other families ignore it, but for SD3's",
    ),
    Feature(
        "`fuse_qkv_projections` with another processor",
        _fuse_projections,
        linears_called,
        _unfuse_projections,
        load=lambda family: tiny.load("sd3.5-large", DTYPE).to(DEVICE),
        families=("SD3",),
        fused="some",
        refused=r"not fused: its processor .*FusedJointAttnProcessor2_0 is not one that ditnorm knows",
        note="of Large: upstream fails in the second attention of Medium",
    ),
    Feature(
        '`set_attention_backend("_native_math")`',
        _backend("_native_math"),
        calls_of(torch.nn.attention, "sdpa_kernel"),  # the output needn't differ: some shapes take this backend without being told
        _default_backend,
        families=without("SD3", "Lumina2"),
        note="SD3's and Lumina 2's attention processors know no backends",
    ),
)
