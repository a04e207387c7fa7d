"""Hooks on parts of a patched model see, and change, what they do on the unpatched one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny
from support.patched import DTYPE, fused_calls, run
from support.slow import slow_but
from support.watching import CALLS, FAMILIES, FOR_ALL, MODELS, OF_NORMS, TWO_FAMILIES, WATCHES, Watch, norms, same, watched
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ditnorm.patching import patch_model, report


@pytest.mark.parametrize("order", ["hooks after", "hooks before"])
@pytest.mark.parametrize("watch", WATCHES, ids=lambda watch: watch.__name__)
@pytest.mark.parametrize("name", slow_but(TWO_FAMILIES, MODELS))
def test_hooks_are_shown_what_upstream_shows(name: str, watch: Watch, order: str) -> None:
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    outputs: list[Tensor] = []
    expected = watched(upstream, watch, lambda: outputs.append(run(upstream, name)))
    assert expected
    if order == "hooks after":
        patch_model(model, strict=True)

    def call() -> None:
        if order == "hooks before":
            patch_model(model, strict=True)
        outputs.append(run(model, name))

    assert same(watched(model, watch, call), expected)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_modules_are_called_as_upstream_calls_them(name: str) -> None:
    """All but the norms: a hook is given the same arguments, by position or by name."""

    def calls(model: nn.Module) -> list[tuple[str, list[Any], dict[str, Any]]]:
        found: list[tuple[str, list[Any], dict[str, Any]]] = []
        left = set(norms(model))

        def hook(path: str, args: Any, kwargs: Any) -> None:
            found.append((path, [type(value) for value in args], {key: type(value) for key, value in kwargs.items()}))

        for path, module in model.named_modules():
            if module not in left:
                module.register_forward_pre_hook(lambda _, args, kwargs, path=path: hook(path, args, kwargs), with_kwargs=True)
        run(model, name)
        return found

    expected, got = calls(tiny.load(name, DTYPE)), calls(patch_model(tiny.load(name, DTYPE)))
    assert [path for path, *_ in expected] == [path for path, *_ in got]
    assert [(ours, upstreams) for ours, upstreams in zip(got, expected, strict=True) if ours != upstreams] == []


@pytest.mark.parametrize("watch", OF_NORMS, ids=lambda watch: watch.__name__)
@pytest.mark.parametrize("name", slow_but(TWO_FAMILIES, FAMILIES))
def test_hooked_norms_are_reported(name: str, watch: Watch) -> None:
    model = patch_model(tiny.load(name, DTYPE), strict=True)
    names = {module: path for path, module in model.named_modules()}
    fused = [names[norm] for norm in norms(model) if type(norm).__module__.startswith("ditnorm")]
    assert report(model).transformers[0].hooked == []
    watch(model, lambda *args: None)
    assert sorted(report(model).transformers[0].hooked) == sorted(fused)


@pytest.mark.parametrize("watch", FOR_ALL, ids=lambda watch: watch.__name__)
def test_hooks_for_all_modules_are_reported_and_the_sites_are_fused_again_without_them(watch: Watch) -> None:
    model = patch_model(tiny.load("wan-t2v", DTYPE), strict=True)
    stop: Any = watch(model, lambda *args: None)
    assert len(report(model).transformers[0].hooked) == 1 + 3 * (3 + 4)  # the embedding too
    assert fused_calls(lambda: run(model)) == 3 * (1 + 3)  # the residuals behind the MLPs, and the norms without their modulation
    stop()
    assert report(model).transformers[0].hooked == []
    assert fused_calls(lambda: run(model)) == CALLS["wan-t2v"]


# Hooks that change what they see


def halve_outputs(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def halve_outputs_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(0.5)


def halve_inputs_in_place(module: nn.Module, args: Any) -> None:
    args[0].mul_(0.5)


CHANGES = [
    lambda norm: norm.register_forward_hook(halve_outputs),
    lambda norm: norm.register_forward_hook(halve_outputs_in_place),
    lambda norm: norm.register_forward_pre_hook(halve_inputs_in_place),
]


@pytest.mark.parametrize("dtype", [DTYPE, torch.float32])
@pytest.mark.parametrize("change", CHANGES, ids=["outputs", "outputs in place", "inputs in place"])
@pytest.mark.parametrize("name", slow_but(TWO_FAMILIES, MODELS))
def test_what_a_hook_writes_to_a_norm_counts(name: str, change: Callable[[nn.Module], object], dtype: torch.dtype) -> None:
    model, upstream = tiny.load(name, dtype), tiny.load(name, dtype)
    arguments = tiny.inputs(name, 2, dtype)
    plain = tiny.run(upstream, arguments)
    patch_model(model, strict=True)
    for one in (model, upstream):
        for norm in norms(one)[::2]:
            change(norm)
    expected = tiny.run(upstream, arguments)
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(tiny.run(model, arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("change", [halve_outputs_in_place, halve_inputs_in_place], ids=["outputs in place", "inputs in place"])
@pytest.mark.parametrize("name", slow_but(FAMILIES, MODELS))
def test_what_a_hook_for_all_modules_writes_counts(name: str, change: Callable[..., None]) -> None:
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    patch_model(model, strict=True)

    def write(module: nn.Module, args: Any, *output: Any) -> None:
        if type(module).__name__ in ("LayerNorm", "FP32LayerNorm", "RMSNorm", "Linear", "GELU"):
            change(module, args, *output)

    register: Any = torch_module.register_module_forward_hook
    if change is halve_inputs_in_place:
        register = torch_module.register_module_forward_pre_hook
    handle = register(write)
    try:
        expected, found = run(upstream, name), run(model, name)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("change", [halve_outputs_in_place, halve_inputs_in_place], ids=["outputs in place", "inputs in place"])
@pytest.mark.parametrize("name", slow_but(FAMILIES, MODELS))
def test_what_hooks_on_the_other_leaves_of_blocks_write_counts(name: str, change: Callable[..., None]) -> None:
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    patch_model(model, strict=True)
    for one in (model, upstream):
        for module in one.modules():
            if isinstance(module, nn.Linear) and len(list(module.parameters())) == 2:
                hook: Any = change
                module.register_forward_pre_hook(hook) if change is halve_inputs_in_place else module.register_forward_hook(hook)
    torch.testing.assert_close(run(model, name), run(upstream, name), rtol=0, atol=0, equal_nan=True)
