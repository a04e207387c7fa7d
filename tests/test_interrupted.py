"""Patching and unpatching that end early, at any point: the model runs, with its bits, and patching
again finishes the work.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import accelerate.hooks
import pytest
import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from support import tiny
from support.patched import DTYPE, classes, fused_calls, is_patched, run
from support.slow import slow_but
from torch import nn

from ditnorm import kernels
from ditnorm.patching import patch, patch_model, report, unpatch_model
from ditnorm.swapping import generated, hook_chains

FAMILIES = ["wan-t2v", "qwen-image", "hunyuan-video"]
OF_EACH_CLASS = [*{model.cls: name for name, model in tiny.MODELS.items()}.values(), "wan-ti2v-text"]


class Interrupted(BaseException):
    """As KeyboardInterrupt: nobody catches it."""


def expect_bits(model: nn.Module, name: str, expected: torch.Tensor, state: object) -> None:
    assert torch.equal(run(model, name), expected), state


@pytest.mark.parametrize("name", slow_but(["wan-ti2v-text", "qwen-image-2.1-without-causal-condition", "hunyuan-image"], OF_EACH_CLASS))
def test_a_model_runs_with_its_bits_wherever_patching_or_unpatching_ends_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state between two classes, in one pass: to end there changes nothing more."""
    model = tiny.load(name, DTYPE)
    expected = run(model, name)
    swap = patch.set_class

    def swap_and_run(module: nn.Module, cls: type) -> None:
        swap(module, cls)
        expect_bits(model, name, expected, f"after {type(module).__name__}")

    monkeypatch.setattr(patch, "set_class", swap_and_run)
    patch_model(model, strict=True)
    unpatch_model(model)
    assert not is_patched(model)


@pytest.mark.parametrize("name", slow_but(["qwen-image"], FAMILIES))
def test_patching_again_or_unpatching_finishes_what_an_error_ended_at_any_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.load(name, DTYPE)
    del model.get_submodule("blocks" if name.startswith("wan") else "transformer_blocks")[1:]
    upstream = classes(model)
    complete = classes(patch_model(model))
    swap, left = patch.set_class, sys.maxsize

    def swap_until(module: nn.Module, cls: type) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        swap(module, cls)

    def end_early(direction: Callable[..., Any], steps: int) -> None:
        nonlocal left
        left = steps
        with pytest.raises(Interrupted):
            direction(model)
        left = sys.maxsize

    monkeypatch.setattr(patch, "set_class", swap_until)
    for steps in range(0, sum(a is not b for a, b in zip(upstream, complete, strict=True)), 5):
        end_early(unpatch_model, steps)
        assert classes(patch_model(model)) == complete
        end_early(unpatch_model, steps)
        assert classes(unpatch_model(model)) == upstream
        end_early(patch_model, steps)
        assert classes(unpatch_model(model)) == upstream
        end_early(patch_model, steps)
        assert classes(patch_model(model)) == complete


@contextmanager
def interrupted_at_line(code: Any, position: int) -> Iterator[Callable[[], bool]]:
    """Raises at a line of a function, counted over all its calls: between any two of its steps."""
    passed = 0

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed
        if event == "line":
            passed += 1
            if passed > position:
                sys.settrace(None)
                raise Interrupted
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: line if frame.f_code is code else None)
    try:
        yield lambda: passed > position
    except Interrupted:
        pass
    finally:
        sys.settrace(before)


class ThroughNewForward(ModelHook):
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


def hooked(model: nn.Module) -> nn.Module:
    """One block, its first norm and an attention carry hooks of both libraries, which call the
    forwards that they captured.
    """
    block = model.blocks[0]
    for module in (block, block.norm1, block.norm2, block.attn1.norm_q):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(ThroughNewForward(), "new_forward")
        registry.register_hook(ModelHook(), "plain")
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    del model.blocks[1:]
    return model


@pytest.mark.parametrize("direction", [patch_model, unpatch_model])
def test_a_hooked_module_left_between_its_class_and_its_hooks_runs_and_is_finished(direction: Callable[..., Any]) -> None:
    model = hooked(tiny.load("wan-t2v", DTYPE))
    expected = run(model)
    complete = fused_calls(lambda: run(patch_model(model)))
    position, ended_early = 0, True
    while ended_early:
        (unpatch_model if direction is patch_model else patch_model)(model)
        with interrupted_at_line(hook_chains.set_class.__code__, position) as ended:
            direction(model)
        ended_early = ended()
        expect_bits(model, "wan-t2v", expected, position)
        if position % 2:
            assert not is_patched(unpatch_model(model))
            expect_bits(model, "wan-t2v", expected, position)
        patch_model(model, strict=True)
        before = sum(kernels.counts().values())
        expect_bits(model, "wan-t2v", expected, position)
        assert sum(kernels.counts().values()) - before == complete
        position += 5  # a module takes seven lines or more
    assert position > 50


def test_classes_that_cannot_be_made_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny.load("wan-t2v", DTYPE), 0
    before = classes(model)

    def fail(body: type, origin: type, rounding: str) -> type:
        nonlocal made
        made += 1
        if made == 20:
            raise Interrupted
        return subclass(body, origin, rounding)

    subclass = generated.subclass
    monkeypatch.setattr(generated, "subclass", fail)
    with pytest.raises(Interrupted):
        patch_model(model)
    assert classes(model) == before


def test_the_report_of_a_model_left_halfway_counts_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, swap, left = tiny.load("wan-t2v", DTYPE), patch.set_class, 20

    def swap_until(module: nn.Module, cls: type) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Interrupted
        swap(module, cls)

    monkeypatch.setattr(patch, "set_class", swap_until)
    with pytest.raises(Interrupted):
        patch_model(model)
    (transformer,) = report(model).transformers
    assert 0 < transformer.fused < transformer.blocks
    assert transformer.changed == {}


# Parts


@pytest.mark.parametrize(("name", "norm"), [("wan-t2v", "blocks.0.norm1"), ("qwen-image", "transformer_blocks.0.img_norm1")])
def test_a_part_of_a_fused_block_stays_fused_when_it_alone_is_unpatched(name: str, norm: str) -> None:
    model = tiny.load(name, DTYPE)
    expected = run(model, name)
    before = classes(patch_model(model))
    with pytest.warns(UserWarning, match=r"the model itself not unpatched: a part of another fused module \(.*TransformerBlock\)"):
        unpatch_model(model.get_submodule(norm))
    assert classes(model) == before
    expect_bits(model, name, expected, norm)


def test_a_norm_that_two_blocks_share_stays_fused_as_long_as_one_of_them_is() -> None:
    model = tiny.load("wan-t2v", DTYPE)
    model.blocks[0].norm1 = model.blocks[1].norm1
    expected = run(model)
    patch_model(model)
    with pytest.warns(UserWarning, match=r"norm1 not unpatched: a part of another fused module \(WanTransformerBlock\); unpatch that"):
        unpatch_model(model.blocks[0])
    assert generated.origin_of(type(model.blocks[0])) is None
    assert generated.origin_of(type(model.blocks[0].norm2)) is None
    expect_bits(model, "wan-t2v", expected, "one unpatched")
    unpatch_model(model.blocks[1])
    assert not is_patched(model.blocks[:2])
    expect_bits(model, "wan-t2v", expected, "both unpatched")


@pytest.mark.parametrize("name", FAMILIES)
def test_two_models_that_share_their_leaf_modules_are_unpatched_one_after_the_other(name: str) -> None:
    one, two = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    for path, module in list(one.named_modules()):
        if path and not list(module.children()):
            two.set_submodule(path, module)
    expected = run(two, name)
    patch_model(one)
    patch_model(two)
    with pytest.warns(UserWarning, match="not unpatched: a part of another fused module"):
        unpatch_model(one)
    expect_bits(one, name, expected, "one")
    assert fused_calls(lambda: expect_bits(two, name, expected, "two")) == tiny.MODELS[name].total
    unpatch_model(two)
    assert not is_patched(one)
    assert not is_patched(two)


def test_a_block_that_nobody_uses_any_more_keeps_no_part_fused() -> None:
    model, other = tiny.load("wan-t2v", DTYPE), tiny.load("wan-t2v", DTYPE)
    other.blocks[0].norm1 = model.blocks[0].norm1
    patch_model(other)
    patch_model(model)
    other.blocks[0].itself = [other.blocks[0]]  # a circle, which only the garbage collector frees
    gc.disable()
    try:
        del other
        assert not is_patched(unpatch_model(model))
    finally:
        gc.enable()
