"""Steps of a random walk over what people do to models: hooks, adapters, caches, offloading, parts
replaced, copies, dtypes, quantised weights, training.

Each changes two models of a kind alike, or patches and unpatches the second one.
"""

import copy
import pickle
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.hooks import HookRegistry
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig
from support import quantised, tiny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ditnorm
from ditnorm.ops.bits import same_bits

from .offload import DiffusersHalving, Halving, blocks_of
from .user_hooks import Damped


class Refused(Exception):
    """Both models refuse a step alike."""


@dataclass
class Walker:
    """Both models, and what has happened to them."""

    name: str
    dice: random.Random
    upstream: nn.Module
    ours: nn.Module
    dtype: torch.dtype = torch.float32
    handles: list[list[Any]] = field(default_factory=list)
    """Of each hook of PyTorch's, its handle on either model."""
    adapters: int = 0
    states: set[str] = field(default_factory=set)
    trail: list[str] = field(default_factory=list)

    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.upstream, self.ours

    def both(self, change: Callable[[nn.Module], Any]) -> list[Any]:
        """``change`` of either model, with the same random numbers. What upstream's model refuses,
        ours has to.
        """
        results: list[Any] = []
        seed = self.dice.random()
        for model in self.models():
            torch.manual_seed(int(seed * 1e9))
            try:
                results.append(change(model))
            except Exception as error:
                results.append(error)
        expected, got = (result if isinstance(result, Exception) else None for result in results)
        if type(expected) is not type(got):
            self.fail(f"upstream: {expected!r}\nours: {got!r}\nat the step")
        if expected is not None:
            raise Refused(str(expected).partition("\n")[0])
        return results

    def fail(self, what: str) -> None:
        pytest.fail("\n  ".join([f"{what} after", *self.trail]), pytrace=False)

    def run(self, model: nn.Module, arguments: dict[str, Any]) -> Tensor:
        # Caches want to know which of a step's two calls this is.
        with model.cache_context("cond") if "cache" in self.states else nullcontext():  # type: ignore[operator]
            return tiny.run(model, arguments)

    def some(self, *suffixes: str) -> str:
        """The path of a module whose name ends so."""
        paths = [path for path, _ in self.upstream.named_modules() if path.endswith(suffixes) and "base_layer" not in path]
        return self.dice.choice(paths)


Step = Callable[[Walker], str | None]
"""Does one thing and says what, or None where it can't be done now."""

NORMS = ("norm1", "norm2", "norm3", "norm_q", "norm_k")
PARTS = (*NORMS, "attn", "attn1", "attn2", "ffn", "img_mlp", "to_q", "norm_out", "ff", "feed_forward", "linear_in", "act_mlp", "act_fn")


def patch(walk: Walker) -> str:
    ditnorm.patch_model(walk.ours)
    return "patch"


def patch_single_and_back(walk: Walker) -> str:
    ditnorm.patch_model(walk.ours, rounding="single")
    ditnorm.patch_model(walk.ours)
    return "patch with rounding='single', patch"


def unpatch(walk: Walker) -> str:
    try:
        ditnorm.unpatch_model(walk.ours)
    except RuntimeError as refusal:  # a part was wrapped or derived since; nothing is changed then
        return f"unpatch, refused: {refusal}"
    return "unpatch"


def unpatch_a_block(walk: Walker) -> str:
    block = walk.dice.randrange(len(blocks_of(walk.ours)))
    try:
        ditnorm.unpatch_model(blocks_of(walk.ours)[block])
    except RuntimeError as refusal:
        return f"unpatch block {block}, refused: {refusal}"
    return f"unpatch block {block}"


def add_hook(walk: Walker) -> str:
    _hooked(walk)
    path = walk.some(*PARTS)
    kind = walk.dice.choice(["register_forward_hook", "register_forward_pre_hook"])
    hook = _halve_output if kind == "register_forward_hook" else _halve_input
    walk.handles.append(walk.both(lambda model: getattr(model.get_submodule(path), kind)(hook)))
    return f"{kind} on {path}"


def _hooked(walk: Walker) -> None:
    """A hook on what takes the embedding of the timestep is given row numbers, and can't halve
    them.
    """
    ditnorm.restore_modulation(walk.ours)
    walk.states.add("hooks")


def _halve_output(module: nn.Module, args: Any, output: Any) -> Any:
    return tuple(_halved(o) for o in output) if isinstance(output, tuple) else _halved(output)


def _halve_input(module: nn.Module, args: Any) -> Any:
    return tuple(_halved(arg) for arg in args)


def _halved(value: Any) -> Any:
    return value * 0.5 if isinstance(value, Tensor) and value.is_floating_point() else value


def remove_hook(walk: Walker) -> str | None:
    if not walk.handles:
        return None
    for handle in walk.handles.pop(walk.dice.randrange(len(walk.handles))):
        handle.remove()
    return "remove a hook"


def accelerate_hook(walk: Walker) -> str:
    _hooked(walk)
    path = walk.some(*PARTS)
    walk.both(lambda model: accelerate.hooks.add_hook_to_module(model.get_submodule(path), Halving(), append=True))
    return f"accelerate's hook on {path}"


def remove_accelerate_hooks(walk: Walker) -> str:
    walk.both(accelerate.hooks.remove_hook_from_submodules)
    walk.states.discard("offload")
    return "remove accelerate's hooks"


def diffusers_hook(walk: Walker) -> str | None:
    if "diffusers hook" in walk.states:
        return None
    _hooked(walk)
    path = walk.some(*PARTS)
    walk.both(
        lambda model: HookRegistry.check_if_exists_or_initialize(model.get_submodule(path)).register_hook(DiffusersHalving(), "halving")
    )
    walk.states.add("diffusers hook")
    return f"diffusers' hook on {path}"


def remove_diffusers_hook(walk: Walker) -> str | None:
    if "diffusers hook" not in walk.states:
        return None
    walk.both(lambda model: HookRegistry.check_if_exists_or_initialize(model).remove_hook("halving", recurse=True))
    walk.states.discard("diffusers hook")
    return "remove diffusers' hook"


def sequential_offload(walk: Walker) -> str | None:
    if "offload" in walk.states:  # accelerate can't copy weights that are on the meta device
        return None
    walk.both(lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")))
    walk.states.add("offload")
    remove = walk.dice.random() < 0.7
    if remove:
        walk.both(lambda model: walk.run(model, tiny.inputs(walk.name, 1, walk.dtype)))
        walk.both(accelerate.hooks.remove_hook_from_submodules)
        walk.states.discard("offload")
    return "cpu_offload, a run, and back" if remove else "cpu_offload"


def group_offload(walk: Walker) -> str | None:
    if {"group offload", "adapters", "cast"} & walk.states:
        return None
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    walk.both(lambda model: apply_group_offloading(model, **where))
    walk.states.add("group offload")
    return "group offloading of leaves"


def cast_layerwise(walk: Walker) -> str | None:
    if {"group offload", "adapters", "cast"} & walk.states or walk.dtype is not torch.bfloat16:
        return None
    walk.both(lambda model: apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=["norm", "embed"]))
    walk.states.add("cast")
    return "layerwise casting"


def cache(walk: Walker) -> str:
    enabled = "cache" in walk.states
    walk.both(lambda model: model.disable_cache() if enabled else model.enable_cache(FirstBlockCacheConfig(threshold=0.0)))
    walk.states ^= {"cache"}
    return "disable_cache" if enabled else "enable_cache"


def adapter(walk: Walker) -> str | None:
    # peft makes the weights of an adapter on the device of the layer's: beside those on the meta
    # device they are never initialised.
    if {"group offload", "cast", "offload"} & walk.states:
        return None
    if walk.adapters and walk.dice.random() < 0.5:
        walk.both(lambda model: model.unload_lora())
        walk.adapters = 0
        walk.states.discard("adapters")
        return "unload_lora"
    walk.adapters += 1
    walk.states.add("adapters")
    name = f"adapter{walk.adapters}"
    targets = walk.dice.choice([["to_q", "to_k", "to_v"], ["to_out.0", "ffn.net.2", "img_mlp.net.2"], ["img_mod.1", "ffn.net.0.proj"]])
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    walk.both(lambda model: model.add_adapter(config, adapter_name=name))
    return f"add_adapter on {', '.join(targets)}"


class Around(nn.Module):
    """Somebody's module around a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.norm(*args, **kwargs) * 0.75


def replace_norm(walk: Walker) -> str | None:
    kinds = (nn.LayerNorm, nn.RMSNorm, RMSNorm)
    paths = [p for p, m in walk.upstream.named_modules() if isinstance(m, kinds) and "." in p and not isinstance(m, Damped)]
    if not paths:
        return None
    path = walk.dice.choice(paths)
    parent, _, name = path.rpartition(".")
    how = walk.dice.choice(["setattr", "_modules", "add_module", "register_module"])

    def replace(model: nn.Module) -> None:
        holder, old = model.get_submodule(parent), model.get_submodule(path)
        if isinstance(old, nn.LayerNorm):
            new: nn.Module = Damped(old.normalized_shape, old.eps, old.elementwise_affine).to(next(model.parameters()).dtype)
        else:
            new = Around(old)
        if how == "setattr":
            setattr(holder, name, new)
        elif how == "_modules":
            holder._modules[name] = new
        else:
            getattr(holder, how)(name, new)

    walk.both(replace)
    return f"replace {path} through {how}"


def replace_forward(walk: Walker) -> str:
    path = walk.some(*NORMS)

    def replace(model: nn.Module) -> None:
        norm = model.get_submodule(path)
        original = norm.forward
        norm.forward = lambda *args, **kwargs: original(*args, **kwargs) * 0.75

    walk.both(replace)
    return f"replace the forward of {path} on the instance"


def change_eps(walk: Walker) -> str | None:
    path = walk.some(*NORMS)

    def change(model: nn.Module) -> bool:
        norm = model.get_submodule(path)
        if not hasattr(norm, "eps"):
            return False
        norm.eps = 0.25
        return True

    return f"eps of {path}" if all(walk.both(change)) else None


def duplicate(walk: Walker) -> str | None:
    # What diffusers' hooks captured in a copy is the forward of the module that was copied, whose
    # weights accelerate may have on the meta device: PyTorch multiplies with whatever is in memory.
    if "offload" in walk.states and {"diffusers hook", "cache", "group offload", "cast"} & walk.states:
        return None
    if walk.handles or walk.dice.random() < 0.5:
        walk.upstream, walk.ours = walk.both(copy.deepcopy)
        walk.handles.clear()
        return "deepcopy"
    walk.upstream, walk.ours = walk.both(lambda model: pickle.loads(pickle.dumps(model)))
    return "pickle"


def convert(walk: Walker) -> str | None:
    if {"group offload", "cast"} & walk.states:
        return None
    dtype = walk.dice.choice(tiny.DTYPES)
    walk.both(lambda model: model.to(dtype))
    walk.dtype = dtype
    return f"to {walk.dtype}"


def swap_blocks(walk: Walker) -> str | None:
    blocks = next(child for child in walk.upstream.children() if isinstance(child, nn.ModuleList))
    if [path for path, _ in blocks[0].named_parameters()] != [path for path, _ in blocks[-1].named_parameters()]:
        return None  # SD3.5's last block has no text to hand on

    def swap(model: nn.Module) -> None:
        blocks = next(child for child in model.children() if isinstance(child, nn.ModuleList))
        blocks[0], blocks[-1] = blocks[-1], blocks[0]

    walk.both(swap)
    return "swap the first block with the last"


def state_dict(walk: Walker) -> str:
    walk.ours.load_state_dict(copy.deepcopy(walk.upstream.state_dict()))
    return "load upstream's state dict"


def quantise(walk: Walker) -> str | None:
    if {"offload", "group offload", "cast", "adapters"} & walk.states or walk.dtype is torch.float32:
        return None
    law = walk.dice.choice(quantised.LAWS)
    paths = [path for path, m in walk.upstream.named_modules() if "blocks." in path or path.startswith("layers.")]
    suited = [path for path in paths if quantised.suits(m := walk.upstream.get_submodule(path), law) and type(m.weight) is nn.Parameter]
    chosen = {path for path in suited if walk.dice.random() < 0.6}
    walk.both(lambda model: quantised.quantise(model, law, chosen.__contains__) and None)
    return f"quantise {len(chosen)} of {len(suited)} linear layers: {law}"


def learn(walk: Walker) -> str | None:
    """A step of training: equal gradients."""
    if {"offload", "group offload", "cast", "cache"} & walk.states:
        return None
    arguments = tiny.inputs(walk.name, walk.dice.choice(tiny.BATCHES), walk.dtype, seed=walk.dice.randrange(1000))

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        # The product of query and key has other bits for other layouts.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            tiny.joined(model(**arguments, return_dict=False)).float().square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None and walk.dtype is torch.float32:
                    p.sub_(p.grad, alpha=1e-3)
        model.zero_grad()
        return found

    expected, got = walk.both(gradients)
    differing = [name for name, gradient in expected.items() if name not in got or not same(got[name], gradient)]
    if differing or expected.keys() != got.keys():
        walk.fail(f"other gradients: {differing}, {expected.keys() ^ got.keys()}")
    return "a step of training"


def precompute(walk: Walker) -> str | None:
    if "hooks" in walk.states:
        return None
    try:
        ditnorm.precompute_modulation(walk.ours)
    except (RuntimeError, ValueError) as refusal:
        return f"precompute modulations, refused: {refusal}"
    return "precompute modulations"


def restore(walk: Walker) -> str:
    ditnorm.restore_modulation(walk.ours)
    return "restore modulations"


def train(walk: Walker) -> str:
    mode = walk.dice.random() < 0.5
    walk.both(lambda model: model.train(mode))
    return f"train({mode})"


STEP_KINDS: list[Step] = [
    *[patch] * 4,
    patch_single_and_back,
    *[unpatch] * 2,
    unpatch_a_block,
    *[add_hook] * 2,
    *[remove_hook] * 2,
    accelerate_hook,
    remove_accelerate_hooks,
    diffusers_hook,
    remove_diffusers_hook,
    sequential_offload,
    group_offload,
    cast_layerwise,
    cache,
    adapter,
    adapter,
    replace_norm,
    replace_forward,
    change_eps,
    duplicate,
    convert,
    swap_blocks,
    state_dict,
    train,
    quantise,
    *[learn] * 2,
    precompute,
    restore,
]


def same(got: Tensor, expected: Tensor) -> bool:
    """Whether both have the same bits, whatever their strides."""
    return same_bits(got.contiguous(), expected.contiguous())
