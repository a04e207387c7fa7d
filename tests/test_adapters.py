"""Linear layers in PEFT's LoRA, which fused bodies call by their parts: the bits of PEFT's own
call, and the same gradients, in whatever state an adapter is.
"""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from ditnorm.fused.adapter import adapted

IN, OUT = 16, 24


def layer(dtype: torch.dtype = torch.float32, alpha: int = 4, **config: Any) -> Any:
    """A linear layer with a LoRA that changes what it returns."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(IN, OUT, dtype=dtype)})
    options = {"r": 4, "lora_alpha": alpha, "target_modules": ["linear"], "init_lora_weights": False, **config}
    return peft.inject_adapter_in_model(LoraConfig(**options), model)["linear"]


def results(call: Callable[[Any, Tensor], Tensor], linear: Any, x: Tensor) -> list[Tensor | None]:
    """What a layer returns, and all gradients."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # for a dropout
    y = call(linear, x)
    parameters = [p for p in linear.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.float().square().sum(), [x, *parameters], allow_unused=True)
    return [y.detach(), *grads]


def assert_as_peft(linear: Any, x: Tensor) -> None:
    expected = results(lambda linear, x: linear(x), linear, x)
    for a, b in zip(results(adapted, linear, x), expected, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b) and a.dtype is b.dtype)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


def nodes(y: Tensor) -> list[str]:
    """The names of the nodes that made ``y``."""
    found, seen, todo = [], set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(type(node).__name__)
            todo += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [4, 3, 8])
def test_a_lora_has_the_bits_and_gradients_of_pefts_own_call(dtype: torch.dtype, alpha: int) -> None:
    assert_as_peft(layer(dtype, alpha), rows(dtype))


def test_a_product_that_is_not_scaled_is_added_as_it_is() -> None:
    assert "MulBackward0" in nodes(layer()(rows()))
    assert "MulBackward0" not in nodes(adapted(layer(), rows()))
    assert "MulBackward0" in nodes(adapted(layer(alpha=8), rows()))


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_other_kinds_of_adapters_are_as_pefts_own(config: dict[str, Any]) -> None:
    assert_as_peft(layer(**config), rows())


def test_weights_of_another_dtype_are_as_pefts_own() -> None:
    linear = layer(torch.bfloat16)
    for weights in (linear.lora_A, linear.lora_B):
        weights.float()
    assert_as_peft(linear, rows(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_as_peft(linear, rows(torch.bfloat16))
        assert_as_peft(layer(), rows())


def test_adapters_that_are_off_merged_absent_or_several_are_as_pefts_own() -> None:
    off, merged, several, absent = layer(), layer(), layer(), layer()
    off.enable_adapters(False)
    merged.merge()
    several.update_layer("other", 4, lora_alpha=8, config=LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))
    several.set_adapter(["default", "other"])
    absent.set_adapter([])
    for linear in (off, merged, several, absent):
        assert_as_peft(linear, rows())
    several.set_adapter(["other"])
    assert_as_peft(several, rows())


@pytest.mark.parametrize("path", ["", "base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_see_what_they_saw(path: str) -> None:
    linear, seen = layer(alpha=8), []
    linear.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output.clone())))
    linear(rows())
    adapted(linear, rows())
    (x, y), (own_x, own_y) = seen
    assert torch.equal(x, own_x)
    assert torch.equal(y, own_y)


def test_a_forward_of_somebody_elses_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer()
    own = linear.forward
    linear.forward = lambda x: own(x) + 1
    assert torch.equal(adapted(linear, rows()), own(rows()) + 1)
    del linear.forward
    monkeypatch.setattr(type(linear), "forward", lambda self, x: x)
    assert torch.equal(adapted(linear, rows()), rows())


def test_layers_without_an_adapter_are_called() -> None:
    linear = nn.Linear(IN, OUT)
    assert torch.equal(adapted(linear, rows()), linear(rows()))
