"""Hooks on the way back see, and change, the gradients that they do on the unpatched model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from support.slow import slow_but
from support.watching import FAMILIES, TWO_FAMILIES, Show, Watch, norms, same, watched
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ditnorm.patching import patch_model


def backward_hooks(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        norm.register_full_backward_hook(lambda module, grad_input, grad_output: show(module, (grad_input, grad_output)))


def backward_pre_hooks(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        norm.register_full_backward_pre_hook(show)


def backward_hook_for_all_modules(model: nn.Module, show: Show) -> Callable[[], None]:
    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        show(module, (grad_input, grad_output))

    return torch_module.register_module_full_backward_hook(hook).remove


def backward_pre_hook_for_all_modules(model: nn.Module, show: Show) -> Callable[[], None]:
    return torch_module.register_module_full_backward_pre_hook(show).remove


BACKWARD = [backward_hooks, backward_pre_hooks, backward_hook_for_all_modules, backward_pre_hook_for_all_modules]


def gradients(model: nn.Module, name: str) -> list[Tensor]:
    model.zero_grad()
    arguments = tiny.inputs(name, 2, torch.float32)
    tiny.joined(model(**arguments, return_dict=False)).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("watch", BACKWARD, ids=lambda watch: watch.__name__)
@pytest.mark.parametrize("name", slow_but(TWO_FAMILIES, FAMILIES))
def test_hooks_on_the_way_back_are_shown_what_upstream_shows(name: str, watch: Watch) -> None:
    model, upstream = tiny.load(name, torch.float32), tiny.load(name, torch.float32)
    patch_model(model, strict=True)
    grads: list[list[Tensor]] = []
    expected = watched(upstream, watch, lambda: grads.append(gradients(upstream, name)))
    assert expected
    shown = watched(model, watch, lambda: grads.append(gradients(model, name)))
    assert same(shown, expected)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def without_weights(model: nn.Module) -> list[nn.Module]:
    """Activations and dropouts."""
    return [m for m in model.modules() if not (list(m.children()) or list(m.parameters()))]


def backward_hooks_of_activations(model: nn.Module, show: Show) -> None:
    for module in without_weights(model):
        module.register_full_backward_hook(lambda module, grad_input, grad_output: show(module, (grad_input, grad_output)))


def backward_pre_hooks_of_activations(model: nn.Module, show: Show) -> None:
    for module in without_weights(model):
        module.register_full_backward_pre_hook(show)


@pytest.mark.parametrize("watch", [backward_hooks_of_activations, backward_pre_hooks_of_activations], ids=lambda watch: watch.__name__)
@pytest.mark.parametrize("name", ["flux", "flux2", "z-image-small", "lumina2", "ltx2", "sd3.5-medium", "wan-t2v", "hunyuan-video"])
def test_an_activation_with_a_hook_on_the_way_back_is_called_as_a_module(name: str, watch: Watch) -> None:
    model, upstream = tiny.load(name, torch.float32), tiny.load(name, torch.float32)
    patch_model(model)
    grads: list[list[Tensor]] = []
    expected = watched(upstream, watch, lambda: grads.append(gradients(upstream, name)))
    assert expected
    shown = watched(model, watch, lambda: grads.append(gradients(model, name)))
    assert same(shown, expected)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def halved(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient * 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gradient_that_a_backward_hook_changes_counts(name: str) -> None:
    model, upstream = tiny.load(name, torch.float32), tiny.load(name, torch.float32)
    plain = gradients(upstream, name)
    patch_model(model, strict=True)
    for one in (model, upstream):
        for norm in norms(one)[::2]:
            norm.register_full_backward_hook(lambda module, grad_input, grad_output: tuple(map(halved, grad_input)))
    expected = gradients(upstream, name)
    assert not all(torch.equal(a, b) for a, b in zip(expected, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, name), expected, strict=True))
