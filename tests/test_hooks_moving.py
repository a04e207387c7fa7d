"""Hooks that only move or cast weights leave all sites fused."""

from collections.abc import Callable

import accelerate
import accelerate.hooks
import pytest
import torch
from diffusers.hooks.group_offloading import GroupOffloadingHook
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from support import tiny
from support.patched import DTYPE, fused_calls, run
from support.slow import slow_but
from support.watching import CALLS, FAMILIES, TWO_FAMILIES, norms
from torch import nn

from ditnorm.patching import patch_model, report


def align_devices(norm: nn.Module) -> None:
    accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))


def align_devices_twice(norm: nn.Module) -> None:
    align_devices(norm)
    accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.AlignDevicesHook(execution_device="cpu"), append=True)


def offload(norm: nn.Module) -> None:
    if list(norm.parameters()):
        accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.CpuOffload(execution_device="cpu"))


def cast(norm: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(norm).register_hook(LayerwiseCastingHook(DTYPE, DTYPE, non_blocking=False), "cast")


def cast_in_accelerate(norm: nn.Module) -> None:
    hook = getattr(accelerate.hooks, "LayerwiseCastingHook", None) or pytest.skip("this accelerate has no such hook")
    accelerate.hooks.add_hook_to_module(norm, hook(storage_dtype=DTYPE, compute_dtype=DTYPE, non_blocking=False))


def cast_and_align(norm: nn.Module) -> None:
    cast(norm)
    align_devices(norm)


@pytest.mark.parametrize("order", ["hooks after", "hooks before"])
@pytest.mark.parametrize("hook", [align_devices, align_devices_twice, offload, cast, cast_in_accelerate, cast_and_align])
@pytest.mark.parametrize("name", slow_but(TWO_FAMILIES, FAMILIES))
def test_hooks_that_move_or_cast_weights_leave_all_sites_fused(name: str, hook: Callable[[nn.Module], None], order: str) -> None:
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    for norm in norms(upstream):
        hook(norm)
    expected = run(upstream, name)  # some weights of norms are in float32
    if order == "hooks after":
        patch_model(model, strict=True)
    for norm in norms(model):
        hook(norm)
    if order == "hooks before":
        patch_model(model, strict=True)
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)) == CALLS[name]
    assert report(model).transformers[0].hooked == []


def test_the_hook_of_group_offloading_is_known() -> None:
    # Its group holds tensors and streams that a test can't make by hand:
    # tests/test_patching_hooks.py runs it.
    assert GroupOffloadingHook.__module__ == "diffusers.hooks.group_offloading"
