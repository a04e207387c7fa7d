"""Hooks on parts of a patched model see, and change, what they do on the unpatched one. What only
moves weights stays fused.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import accelerate
import accelerate.hooks
import pytest
import torch
from diffusers.hooks.group_offloading import GroupOffloadingHook
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from support import tiny
from support.patched import DTYPE, fused_calls, run
from support.slow import slow_but
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from ditnorm.models import wan
from ditnorm.patching import patch_model, report

MODELS = ["wan-t2v", "wan-without-cross-attn-norm", "qwen-image", "hunyuan-video", "hunyuan-video-token-replace", "hunyuan-video-1.5"]
MODELS = [name for name in [*MODELS, "qwen-image-2.1"] if name in tiny.MODELS]
FAMILIES = ["wan-t2v", "qwen-image", "hunyuan-video"]
TWO_FAMILIES = ["wan-t2v", "qwen-image"]
CALLS = {name: tiny.MODELS[name].total for name in MODELS}

Shown = list[tuple[str, Any]]
Show = Callable[[nn.Module, Any], None]
Watch = Callable[[nn.Module, Show], object]


def norms(model: nn.Module) -> list[nn.Module]:
    """All that the fused ops stand in for."""
    last = ("norm1", "norm2", "norm3", "norm", "norm_q", "norm_k", "norm_added_q", "norm_added_k", "img_norm1", "img_norm2", "txt_norm1")
    found = [m for name, m in model.named_modules() if name.endswith(last) and not list(m.children())]
    return [m for m in found if type(m).__name__ in ("LayerNorm", "FP32LayerNorm", "RMSNorm", "Identity")]


def values(tree: object) -> list[Any]:
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else type(leaf) for leaf in pytree.tree_leaves(tree)]


def same(a: Shown, b: Shown) -> bool:
    if [name for name, _ in a] != [name for name, _ in b]:
        return False
    for (_, left), (_, right) in zip(a, b, strict=True):
        if len(left) != len(right):
            return False
        for x, y in zip(left, right, strict=True):
            if not (torch.equal(x, y) and x.dtype is y.dtype if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y):
                return False
    return True


def watched(model: nn.Module, watch: Watch, call: Callable[[], object]) -> Shown:
    names = {module: name for name, module in model.named_modules()}
    shown: Shown = []
    stop = watch(model, lambda module, tree: shown.append((names.get(module, type(module).__name__), values(tree))))
    call()
    if callable(stop):
        stop()
    return shown


# Ways to watch a forward pass. Each shows the inputs and outputs, or what of them it is given.


def own_hooks(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        norm.register_forward_hook(lambda module, args, output: show(module, (args, output)))


def own_hooks_with_keywords(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        norm.register_forward_hook(lambda module, args, kwargs, output: show(module, (args, kwargs, output)), with_kwargs=True)


def own_pre_hooks(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        norm.register_forward_pre_hook(show)


class AccelerateHook(accelerate.hooks.ModelHook):
    def __init__(self, show: Show) -> None:
        self.show = show

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.show(module, (args, kwargs))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.show(module, output)
        return output


def accelerate_hooks(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        accelerate.hooks.add_hook_to_module(norm, AccelerateHook(show))


def accelerate_hooks_among_others(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
        accelerate.hooks.add_hook_to_module(norm, AccelerateHook(show), append=True)


def accelerate_hooks_put_in_place(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
        norm._hf_hook = AccelerateHook(show)


class DiffusersHook(ModelHook):
    def __init__(self, show: Show) -> None:
        super().__init__()
        self.show = show

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.show(module, (args, kwargs))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.show(module, output)
        return output


class DiffusersNewForward(ModelHook):
    def __init__(self, show: Show) -> None:
        super().__init__()
        self.show = show

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.show(module, (args, kwargs, output))
        return output


def diffusers_hooks(model: nn.Module, show: Show, hook: type[Any] = DiffusersHook) -> None:
    for norm in norms(model):
        HookRegistry.check_if_exists_or_initialize(norm).register_hook(hook(show), "showing")


def diffusers_new_forwards(model: nn.Module, show: Show) -> None:
    diffusers_hooks(model, show, DiffusersNewForward)


def diffusers_hooks_among_others(model: nn.Module, show: Show) -> None:
    for norm in norms(model):
        registry = HookRegistry.check_if_exists_or_initialize(norm)
        registry.register_hook(LayerwiseCastingHook(DTYPE, DTYPE, non_blocking=False), "first")
        registry.register_hook(DiffusersHook(show), "showing")
        registry.register_hook(LayerwiseCastingHook(DTYPE, DTYPE, non_blocking=False), "last")


def hook_for_all_modules(model: nn.Module, show: Show) -> Callable[[], None]:
    return torch_module.register_module_forward_hook(lambda module, args, output: show(module, (args, output))).remove


def pre_hook_for_all_modules(model: nn.Module, show: Show) -> Callable[[], None]:
    return torch_module.register_module_forward_pre_hook(show).remove


def another_call_for_all_modules(model: nn.Module, show: Show) -> Callable[[], None]:
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        show(self, (args, kwargs, output))
        return output

    nn.Module.__call__ = call
    return lambda: setattr(nn.Module, "__call__", original)


def hooks_of_every_module(model: nn.Module, show: Show) -> None:
    for module in model.modules():
        module.register_forward_hook(lambda module, args, kwargs, output: show(module, (args, kwargs, output)), with_kwargs=True)


OF_NORMS = [
    own_hooks,
    own_hooks_with_keywords,
    own_pre_hooks,
    accelerate_hooks,
    accelerate_hooks_among_others,
    accelerate_hooks_put_in_place,
    diffusers_hooks,
    diffusers_new_forwards,
    diffusers_hooks_among_others,
]
FOR_ALL = [hook_for_all_modules, pre_hook_for_all_modules, another_call_for_all_modules]
WATCHES = [*OF_NORMS, *FOR_ALL, hooks_of_every_module]


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    call = nn.Module.__call__
    yield
    nn.Module.__call__ = call
    torch_module._global_forward_hooks.clear()
    torch_module._global_forward_pre_hooks.clear()
    torch_module._global_backward_hooks.clear()
    torch_module._global_backward_pre_hooks.clear()


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


# Hooks on the way back


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
    output = model(**arguments, return_dict=False)
    output = output[0] if isinstance(output, tuple) else torch.stack(output)
    output.square().sum().backward()
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


# Hooks that move and cast weights


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


# The embedding whose rows TI2V shares


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
