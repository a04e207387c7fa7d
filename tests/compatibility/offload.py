"""accelerate's hooks and offloading, diffusers' group offloading and layerwise casting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.hooks
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from .feature import DEVICE, DTYPE, Feature, calls_of, halved, its_output, weights_at_rest


class Halving(accelerate.hooks.ModelHook):
    """Changes what it hooks, so that a lost hook shows."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return halved(output)


class DiffusersHalving(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return halved(output)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order."""
    names = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers")
    return [block for name, child in model.named_children() if name in names for block in child]  # type: ignore[union-attr]


def inside_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """What the transformer blocks hold, by its name in the model."""
    blocks = set(blocks_of(model))
    return {
        f"{name}.{inner}": module for name, block in model.named_modules() if block in blocks for inner, module in block.named_modules()
    }


def _accelerate_hook(model: nn.Module, folder: Path) -> nn.Module:
    for block in blocks_of(model):
        accelerate.hooks.add_hook_to_module(block, Halving())
        accelerate.hooks.add_hook_to_module(block, Halving(), append=True)
    return model


def _remove_accelerate_hooks(model: nn.Module) -> nn.Module:
    accelerate.hooks.remove_hook_from_submodules(model)
    return model


def _diffusers_hook(model: nn.Module, folder: Path) -> nn.Module:
    for block in blocks_of(model):
        HookRegistry.check_if_exists_or_initialize(block).register_hook(DiffusersHalving(), "halving")
    return model


def _remove_diffusers_hook(model: nn.Module) -> nn.Module:
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("halving", recurse=True)
    return model


def _both(model: nn.Module, folder: Path) -> nn.Module:
    return _accelerate_hook(_diffusers_hook(model, folder), folder)


def _remove_both(model: nn.Module) -> nn.Module:
    return _remove_diffusers_hook(_remove_accelerate_hooks(model))


def _sequential_offload(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device(DEVICE))


def _disk_offload(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device(DEVICE))


def _model_offload(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload_with_hook(model, execution_device=torch.device(DEVICE))[0]


def _device_map(model: nn.Module, folder: Path) -> nn.Module:
    """Every other block on disk, the rest on the device."""
    device_map: dict[str, Any] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            device_map |= {f"{name}.{i}": "disk" if i % 2 else DEVICE for i in range(len(child))}
        else:
            device_map[name] = DEVICE
    device_map |= {name: DEVICE for name, _ in model.named_parameters(recurse=False)}
    return accelerate.dispatch_model(model, device_map, main_device=DEVICE, offload_dir=str(folder), force_hooks=True)


def _inferred_device_map(model: Any, folder: Path) -> nn.Module:
    """What the memory holds without splitting a block on the device, the rest on disk."""
    size = sum(p.nbytes for p in model.parameters())
    memory = {0 if DEVICE == "cuda" else "cpu": size * 3 // 4}
    device_map = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    assert {"disk", *memory} == set(device_map.values())
    return accelerate.dispatch_model(model, device_map, main_device=DEVICE, offload_dir=str(folder), force_hooks=True)


def _device_map_of(model: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """Where each part is."""
    return run(), getattr(model, "hf_device_map", None)


def group_offload(disk: bool = True, **how: Any) -> Any:
    def apply(model: nn.Module, folder: Path) -> nn.Module:
        onload, offload, path = torch.device(DEVICE), torch.device("cpu"), str(folder) if disk else None
        apply_group_offloading(model, onload_device=onload, offload_device=offload, offload_to_disk_path=path, **how)
        return model

    return apply


def _layerwise_casting(model: nn.Module, folder: Path) -> nn.Module:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPE)  # type: ignore[operator]
    return model


FEATURES = (
    Feature("accelerate `add_hook_to_module` on every block", _accelerate_hook, its_output, _remove_accelerate_hooks),
    Feature("diffusers `ModelHook` on every block", _diffusers_hook, its_output, _remove_diffusers_hook),
    Feature("both kinds of hooks on every block", _both, its_output, _remove_both),
    Feature("accelerate `cpu_offload` (sequential)", _sequential_offload, weights_at_rest, _remove_accelerate_hooks),
    Feature("accelerate `disk_offload`", _disk_offload, weights_at_rest),
    Feature("accelerate `cpu_offload_with_hook` (model)", _model_offload, calls_of(CpuOffload, "pre_forward"), _remove_accelerate_hooks),
    Feature("accelerate `dispatch_model`, CPU and disk", _device_map, calls_of(AlignDevicesHook, "pre_forward")),
    Feature("accelerate `infer_auto_device_map`, disk", _inferred_device_map, _device_map_of),
    Feature(
        "group offloading, block level, disk",
        group_offload(offload_type="block_level", num_blocks_per_group=1),
        calls_of(ModuleGroup, "onload_"),
    ),
    Feature("group offloading, leaf level, disk", group_offload(offload_type="leaf_level"), calls_of(ModuleGroup, "onload_")),
    Feature("layerwise casting, fp8 storage", _layerwise_casting, weights_at_rest),
)
