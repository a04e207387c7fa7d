"""Patching, in any order with the hooks of diffusers and accelerate: what hooks do stays in effect,
and can be taken away.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.hooks
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from support import tiny
from support.patched import DTYPE, fused_calls, is_patched, run
from torch import Tensor, nn

from ditnorm.patching import patch_model, unpatch_model
from ditnorm.swapping import hook_chains


@pytest.fixture
def model() -> nn.Module:
    return tiny.load("wan-t2v", DTYPE)


class Doubling(accelerate.hooks.ModelHook):
    """Changes what it hooks, so that a lost hook shows."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


class DiffusersDoubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


class DiffusersNewForward(ModelHook):
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs) * 2


def accelerate_hook(model: nn.Module, folder: Path) -> None:
    for block in model.blocks:
        accelerate.hooks.add_hook_to_module(block, Doubling())


def accelerate_hook_appended(model: nn.Module, folder: Path) -> None:
    accelerate_hook(model, folder)
    for block in model.blocks:
        accelerate.hooks.add_hook_to_module(block, Doubling(), append=True)


def diffusers_hooks(model: nn.Module, folder: Path) -> None:
    for block in model.blocks:
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(DiffusersDoubling(), "doubling")
        registry.register_hook(DiffusersNewForward(), "new_forward")


def both_libraries(model: nn.Module, folder: Path) -> None:
    diffusers_hooks(model, folder)
    accelerate_hook(model, folder)
    for block in model.blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(DiffusersDoubling(), "last")


def sequential_offload(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def model_offload(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def group_offload_blocks(model: nn.Module, folder: Path) -> None:
    _group_offload(model, folder, offload_type="block_level", num_blocks_per_group=1)


def group_offload_leaves(model: nn.Module, folder: Path) -> None:
    _group_offload(model, folder, offload_type="leaf_level")


def _group_offload(model: nn.Module, folder: Path, **how: Any) -> None:
    device = torch.device("cpu")
    apply_group_offloading(model, onload_device=device, offload_device=device, offload_to_disk_path=str(folder), **how)


def layerwise_casting(model: nn.Module, folder: Path) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPE)


def first_block_cache(model: nn.Module, folder: Path) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))


FEATURES = [
    accelerate_hook,
    accelerate_hook_appended,
    diffusers_hooks,
    both_libraries,
    sequential_offload,
    model_offload,
    group_offload_blocks,
    group_offload_leaves,
    layerwise_casting,
    first_block_cache,
]


def run_twice(model: nn.Module) -> Tensor:
    """A cache skips blocks in the second call."""
    with model.cache_context("cond"):
        outputs = torch.stack([run(model), run(model)])
    model._reset_stateful_cache()
    return outputs


@pytest.mark.parametrize("order", ["patch first", "feature first"])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
def test_a_feature_keeps_working_on_a_patched_model_and_after_unpatching(
    model: nn.Module, feature: Callable[[nn.Module, Path], None], order: str, tmp_path: Path
) -> None:
    upstream = copy.deepcopy(model)
    folders = tmp_path / "upstream", tmp_path / "patched"
    feature(upstream, folders[0])
    expected = run_twice(upstream)
    plain_calls = 2 * tiny.MODELS["wan-t2v"].total

    if order == "patch first":
        patch_model(model)
    feature(model, folders[1])
    patch_model(model, strict=True)
    calls = fused_calls(lambda: torch.testing.assert_close(run_twice(model), expected, rtol=0, atol=0))
    assert calls == (plain_calls - 12 if feature is first_block_cache else plain_calls)  # the cache skips two of three blocks once

    unpatch_model(model)
    assert not is_patched(model)
    assert fused_calls(lambda: torch.testing.assert_close(run_twice(model), expected, rtol=0, atol=0)) == 0


@pytest.mark.parametrize("order", ["unpatch first", "remove first"])
def test_hooks_may_be_removed_before_and_after_unpatching(model: nn.Module, order: str) -> None:
    expected = run(model)
    both_libraries(model, Path())
    patch_model(model)

    def remove() -> None:
        for block in model.blocks:
            registry = block._diffusers_hook
            registry.remove_hook("last")
            accelerate.hooks.remove_hook_from_module(block)
            for name in ("new_forward", "doubling"):
                registry.remove_hook(name)

    if order == "remove first":
        remove()
        assert fused_calls(lambda: torch.testing.assert_close(run(model), expected, rtol=0, atol=0)) > 0
        unpatch_model(model)
    else:
        unpatch_model(model)
        remove()
    assert fused_calls(lambda: torch.testing.assert_close(run(model), expected, rtol=0, atol=0)) == 0


def test_a_diffusers_hook_removed_from_below_another_leaves_no_stale_reference(model: nn.Module) -> None:
    # HookRegistry.remove_hook then overwrites `forward` of the upper hook and leaves its
    # `original_forward`.
    diffusers_hooks(model, Path())
    for block in model.blocks:
        block._diffusers_hook.remove_hook("doubling")
    patch_model(model)
    for block in model.blocks:
        block._diffusers_hook.remove_hook("new_forward")
    assert fused_calls(lambda: run(model)) > 0
    unpatch_model(model)
    assert fused_calls(lambda: run(model)) == 0


def test_an_offloaded_norm_is_fused_through_its_own_hook(model: nn.Module) -> None:
    sequential_offload(model, Path())
    assert model.blocks[0].norm2.weight.device.type == "meta"
    patch_model(model)
    assert fused_calls(lambda: run(model)) == tiny.MODELS["wan-t2v"].total


class Overwritten(ModelHook):
    """Weights that are there for the time of a call only; after it their memory is another
    transfer's, as of offloading with a stream.
    """

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.weight = module.weight.detach().clone()
        return self.post_forward(module, module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module.weight.data.copy_(self.weight)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module.weight.data.zero_()
        return output


@pytest.mark.parametrize("name", ["wan-t2v", "qwen-image", "hunyuan-video"])
def test_weights_of_query_and_key_norms_outlive_the_call_that_their_hook_puts_them_in_place_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hook_chains._MOVING, __name__, frozenset({"Overwritten"}))  # it is as those that are known to move weights
    model = tiny.load(name, DTYPE)
    expected = run(model, name)
    norms = [m for path, m in model.named_modules() if path.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k"))]
    for norm in norms:
        HookRegistry.check_if_exists_or_initialize(norm).register_hook(Overwritten(), "overwritten")
    patch_model(model, strict=True)
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)) == tiny.MODELS[name].total
