"""LoRA through diffusers and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .feature import DEVICE, DTYPE, Feature, calls_of, its_output, linears_called

# Of each family the attention, a feed-forward layer and, where there is one, the layer that makes
# the modulation.
TARGETS = [
    *("to_q", "to_k", "to_v", "to_qkv_mlp_proj"),
    *("ffn.net.2", "img_mlp.net.2", "ff.net.2", "ff.linear_out", "feed_forward.w2", "feed_forward.linear_2"),
    *("img_mod.1", "norm1.linear", "norm.linear", "modulation_img.linear", "0.adaLN_modulation.0", "1.adaLN_modulation.0"),
]


_KEPT = "upstream's `unload_lora` leaves such modules where they are"
_SAVED_CALLED = calls_of(ModulesToSaveWrapper, "_forward_wrapped")


def _config(rank: int = 4, **more: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, **more)


def add(model: Any, name: str = "a", seed: int = 1, **more: Any) -> Any:
    """Adds an adapter with random weights."""
    torch.manual_seed(seed)
    model.add_adapter(_config(**more), adapter_name=name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".{name}." in key:
                p.mul_(0.1)
    return model


def _add(model: Any, folder: Path) -> nn.Module:
    return add(model)


def _two(model: Any, folder: Path) -> nn.Module:
    add(add(model, "a", 1), "b", 2, rank=2)
    model.set_adapters(["a", "b"], [0.7, -0.4])
    return model


def _from_file(model: Any, folder: Path) -> nn.Module:
    _saved(model, folder, 1)
    model.load_lora_adapter(str(folder), weight_name="pytorch_lora_weights.safetensors", prefix=None, adapter_name="a")
    return model


def _hotswap(model: Any, folder: Path) -> nn.Module:
    _from_file(model, folder)
    _saved(model, folder, 2)
    model.load_lora_adapter(str(folder), weight_name="pytorch_lora_weights.safetensors", prefix=None, adapter_name="a", hotswap=True)
    return model


def _saved(model: Any, folder: Path, seed: int) -> None:
    other = add(type(model).from_config(model.config).to(DEVICE, DTYPE), "a", seed)
    other.save_lora_adapter(str(folder), adapter_name="a")


def _fuse(model: Any, folder: Path) -> nn.Module:
    add(model).fuse_lora()
    return model


def _fuse_and_unfuse(model: Any, folder: Path) -> nn.Module:
    _fuse(model, folder).unfuse_lora()
    return model


def _disable(model: Any, folder: Path) -> nn.Module:
    _two(model, folder).disable_lora()
    model.enable_lora()
    model.delete_adapters("b")
    return model


def _and_save(*names: str) -> Callable[[Any, Path], Any]:
    """The first of these that a model has."""
    return lambda model, folder: add(model, modules_to_save=[next(name for name in names if _has(model, name))])


def _has(model: nn.Module, name: str) -> bool:
    return any(f".{found}".endswith(f".{name}") for found, _ in model.named_modules())


def _unload(model: Any) -> nn.Module:
    model.unload_lora()
    return model


FEATURES = (
    Feature("`add_adapter`", _add, its_output, _unload),
    Feature("load an adapter from a file", _from_file, its_output, _unload),
    Feature("two adapters with weights", _two, its_output, _unload),
    Feature("disable, enable, delete an adapter", _disable, its_output, _unload),
    Feature("hot-swap an adapter", _hotswap, its_output, _unload),
    Feature("`fuse_lora`", _fuse, its_output),
    Feature("`fuse_lora`, `unfuse_lora`", _fuse_and_unfuse, linears_called),
    Feature(
        "`modules_to_save`: `proj_out`",
        _and_save("proj_out", "x_embedder", "cap_embedder.1"),
        _SAVED_CALLED,
        note=f"of Z-Image and Lumina 2 another layer; {_KEPT}",
    ),
    Feature(
        "`modules_to_save`: a norm",
        _and_save("blocks.1.norm2"),
        _SAVED_CALLED,
        families=("Wan",),
        fused="some",
        refused="no fused layer stands in for .*ModulesToSaveWrapper",
        note=f"the others' norms have no weights; {_KEPT}",
    ),
)
