"""Ways to watch what the modules of a model are given and return, and what was seen."""

from collections.abc import Callable
from typing import Any

import accelerate
import accelerate.hooks
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from . import tiny
from .patched import DTYPE

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
