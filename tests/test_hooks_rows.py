"""Wan makes one row of modulation where all tokens have one timestep: hooks on the embedding and on
blocks still see, and change, a row for each token.
"""

from typing import Any
from unittest import mock

import accelerate
import accelerate.hooks
import pytest
import torch
from diffusers.hooks.hooks import HookRegistry
from support import tiny
from support.patched import DTYPE, run
from support.watching import FOR_ALL, AccelerateHook, DiffusersHook, Show, Watch, same, watched
from torch import nn

from ditnorm.models import wan
from ditnorm.patching import patch_model


def on_embedding(model: nn.Module, show: Show) -> None:
    model.condition_embedder.register_forward_hook(lambda module, args, output: show(module, output))


def accelerate_on_embedding(model: nn.Module, show: Show) -> None:
    accelerate.hooks.add_hook_to_module(model.condition_embedder, AccelerateHook(show))


def diffusers_on_embedding(model: nn.Module, show: Show) -> None:
    HookRegistry.check_if_exists_or_initialize(model.condition_embedder).register_hook(DiffusersHook(show), "showing")


def on_a_block(model: nn.Module, show: Show) -> None:
    model.blocks[2].register_forward_pre_hook(show)


def accelerate_on_a_block(model: nn.Module, show: Show) -> None:
    accelerate.hooks.add_hook_to_module(model.blocks[2], AccelerateHook(show))


ROWS = [on_embedding, accelerate_on_embedding, diffusers_on_embedding, on_a_block, accelerate_on_a_block, *FOR_ALL]


@pytest.mark.parametrize("watch", ROWS, ids=lambda watch: watch.__name__)
def test_hooks_are_shown_the_rows_of_all_tokens(watch: Watch) -> None:
    name = "wan-ti2v-text"
    model, upstream = patch_model(tiny.load(name, DTYPE), strict=True), tiny.load(name, DTYPE)
    output = run(upstream, name)
    expected = watched(upstream, watch, lambda: run(upstream, name))
    assert same(watched(model, watch, lambda: torch.testing.assert_close(run(model, name), output, rtol=0, atol=0)), expected)


def test_what_a_hook_on_the_embedding_changes_for_one_token_counts() -> None:
    name = "wan-ti2v-text"
    model, upstream = patch_model(tiny.load(name, DTYPE), strict=True), tiny.load(name, DTYPE)
    plain = run(upstream, name)

    def write(module: nn.Module, args: Any, output: Any) -> None:
        output[1][:, 1:2].mul_(0.5)

    for one in (model, upstream):
        one.condition_embedder.register_forward_hook(write)
    expected = run(upstream, name)
    assert not torch.equal(expected, plain)
    assert torch.equal(run(model, name), expected)


def test_offloading_leaves_the_rows_shared() -> None:
    model = patch_model(tiny.load("wan-ti2v-text", DTYPE), strict=True)
    accelerate.cpu_offload(model, execution_device="cpu")
    with mock.patch.object(wan, "_modulation", wraps=wan._modulation) as calls:
        run(model, "wan-ti2v-text")
    assert [call.args[0].shape[1] for call in calls.call_args_list] == [1, 1, 1]
