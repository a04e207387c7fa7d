"""PEFT's LoRA layers in patched blocks: upstream's bits and gradients, and no pass over memory that
multiplies by 1.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from support import tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditnorm import patch_model, report, unpatch_model
from ditnorm.fused.lora_linear import LoraLinear
from ditnorm.fused.module import matches

DTYPE = torch.bfloat16
NAMES = ("qwen-image", "wan-t2v", "flux", "z-image")


def adapted(name: str, dtype: torch.dtype = DTYPE, **config: Any) -> Any:
    model: Any = tiny.load(name, dtype).requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(
        LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_out.0", "net.2", "w2"], "init_lora_weights": False} | config)
    )
    return model


@contextmanager
def products() -> Iterator[Counter[str]]:
    """Counts the multiplications by a number, forward and backward."""
    calls: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.mul.Tensor and not isinstance(args[1], Tensor | float | int):
                raise AssertionError(args[1])
            calls["by a number"] += function is torch.ops.aten.mul.Tensor and (not isinstance(args[1], Tensor) or args[1].dim() == 0)
            return function(*args, **(kwargs or {}))

    with Counting():
        yield calls


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    output = tiny.joined(model(**tiny.inputs(name, 2, DTYPE), return_dict=False))
    output.float().square().sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None} | {"output": output.detach()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


def test_the_installed_peft_is_known() -> None:
    assert matches(LoraLinear, PeftLinear)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_multiplied_by_a_scaling_of_one(name: str) -> None:
    model = adapted(name)
    with products() as upstreams:
        expected = gradients(model, name)
    with products() as upstreams_forward:
        tiny.run(model, tiny.inputs(name, 2, DTYPE))
    patch_model(model)
    fused = sum(isinstance(layer, LoraLinear) for layer in layers(model))
    assert fused
    with products() as ours:
        found = gradients(model, name)
    assert equal(found, expected)
    with products() as ours_forward:
        tiny.run(model, tiny.inputs(name, 2, DTYPE))
    assert upstreams_forward["by a number"] - ours_forward["by a number"] == fused
    assert upstreams["by a number"] - ours["by a number"] > fused  # and where gradients come back
    unpatch_model(model)
    assert not any(isinstance(layer, LoraLinear) for layer in layers(model))
    assert equal(gradients(model, name), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 3},
        {"lora_alpha": 4, "r": 4, "use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 1}},
    ],
    ids=str,
)
def test_other_adapters_have_upstreams_bits(config: dict[str, Any]) -> None:
    model = adapted("qwen-image", **config)
    expected = gradients(model, "qwen-image")
    assert equal(gradients(patch_model(model), "qwen-image"), expected)


def test_adapters_change_while_the_model_is_patched() -> None:
    """Another one, both, weights of theirs, none; merged and apart again."""
    name = "qwen-image"
    model = adapted(name)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter_name="other")
    patched = patch_model(copy.deepcopy(model))
    steps: dict[str, Any] = {
        "one": lambda m: m.set_adapters("default"),
        "both, with weights": lambda m: m.set_adapters(["default", "other"], [1.0, -0.5]),
        "none": lambda m: m.disable_adapters(),
        "on again": lambda m: m.enable_adapters(),
        "merged": lambda m: m.fuse_lora(),
        "apart": lambda m: m.unfuse_lora(),
        "deleted": lambda m: m.delete_adapters("other"),
    }
    for what, step in steps.items():
        for m in (model, patched):
            step(m)
        outputs = [tiny.run(m, tiny.inputs(name, 2, DTYPE)) for m in (model, patched)]
        assert torch.equal(*outputs), what


def test_a_scaling_in_a_tensor_is_multiplied_by() -> None:
    """To look at it, the host would wait for the GPU."""
    model = adapted("qwen-image")
    for layer in layers(model):
        layer.scaling["default"] = torch.tensor(1.0, dtype=DTYPE)
    expected = gradients(model, "qwen-image")
    patch_model(model)
    with products() as calls:
        found = gradients(model, "qwen-image")
    assert equal(found, expected)
    assert calls["by a number"] >= len(layers(model))


def test_weights_of_another_dtype_are_cast_for() -> None:
    model = adapted("qwen-image")
    for key, p in model.named_parameters():
        if "lora" in key:
            p.data = p.data.float()
    expected = gradients(model, "qwen-image")
    assert equal(gradients(patch_model(model), "qwen-image"), expected)


def test_what_a_hook_has_seen_of_the_base_layer_stays_as_it_was() -> None:
    """GELU in place would write over it where no adapter is active."""
    name = "wan-t2v"
    model = adapted(name, target_modules=["net.0.proj"])
    model.disable_adapters()
    patch_model(model)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in layers(model):
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    tiny.run(model, tiny.inputs(name, 1, DTYPE))
    assert seen
    assert all(torch.equal(output, copied) for output, copied in seen)


@pytest.mark.parametrize("path", ["", "base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_see_what_they_saw(path: str) -> None:
    model, seen = adapted("qwen-image", lora_alpha=4), []
    layers(model)[0].get_submodule(path).register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output.clone())))
    for m in (model, patch_model(model)):
        tiny.run(m, tiny.inputs("qwen-image", 1, DTYPE))
    assert isinstance(layers(model)[0], LoraLinear)
    (x, y), (own_x, own_y) = seen
    assert torch.equal(x, own_x)
    assert torch.equal(y, own_y)


def test_a_forward_that_somebody_else_puts_there_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(adapted("qwen-image"))
    monkeypatch.setattr(PeftLinear, "forward", lambda self, x, *args, **kwargs: x[..., : self.out_features] + 1)
    x = torch.randn(1, 3, layers(model)[0].in_features, dtype=DTYPE)
    assert torch.equal(layers(model)[0](x), x[..., : layers(model)[0].out_features] + 1)


class Routed(PeftLinear):
    @property
    def active_adapters(self) -> list[str]:
        return ["other"]


def test_a_class_that_chooses_its_adapters_itself_is_called() -> None:
    """It inherits PEFT's forward."""
    name = "qwen-image"
    model = adapted(name)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), adapter_name="other")
    model.set_adapters("default")
    for layer in layers(model):
        layer.__class__ = Routed
    expected = tiny.run(model, tiny.inputs(name, 2, DTYPE))
    assert torch.equal(tiny.run(patch_model(model), tiny.inputs(name, 2, DTYPE)), expected)


def test_the_compiler_says_nothing_of_adapters_in_a_block() -> None:
    """It warns of cached functions that it meets."""
    model = patch_model(adapted("qwen-image"))
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients(model, "qwen-image")
    assert not [str(w.message) for w in caught if "ditnorm" in str(w.message) or "lru_cache" in str(w.message)]


def test_the_report_has_nothing_to_say_of_adapters() -> None:
    model = adapted("qwen-image")
    plain = str(report(patch_model(tiny.load("qwen-image", DTYPE))))
    assert str(report(patch_model(model))) == plain
