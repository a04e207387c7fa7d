"""What adapters read of a norm is made again in the backward pass: the same gradients, less memory,
and only where nobody could tell.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from support import tiny
from support.cases import DEVICE, compiled_only
from support.model_checks import moved
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditnorm import kernels, patch_model
from ditnorm.functional import norm_scale_shift, scale_residual
from ditnorm.fused import lora_linear
from ditnorm.ops.made_again import made_again
from ditnorm.swapping.generated import subclass
from ditnorm.swapping.hook_chains import set_class

pytestmark = compiled_only

D = 64


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, scale, shift = torch.randn(2, 5, D), torch.randn(2, D), torch.randn(2, D)
    return x.to(DEVICE).requires_grad_(), scale.to(DEVICE), shift.to(DEVICE)


def readers() -> list[nn.Linear]:
    torch.manual_seed(1)
    return [nn.Linear(D, 4, bias=False, device=DEVICE) for _ in range(3)]


def read(linear: nn.Linear, y: Tensor) -> Any:
    found = made_again(y, linear)
    assert found is not None
    return found.read_by(linear, y)


def as_it_is(linear: nn.Linear, y: Tensor) -> Any:
    return linear(y)


def normed() -> tuple[Tensor, Tensor]:
    x, scale, shift = inputs()
    return x, norm_scale_shift(x, scale, shift, rounding="eager")


def loss(call: Callable[[nn.Linear, Tensor], Any], linears: list[nn.Linear], y: Tensor) -> Tensor:
    total: Tensor = sum(call(linear, y).square().sum() for linear in linears) + y.sum()  # type: ignore[assignment]
    return total


def equal(found: Any, expected: Any) -> bool:
    return all(map(torch.equal, found, expected))


def test_gradients_are_the_same_and_what_was_read_is_not_kept() -> None:
    results = []
    for call in (as_it_is, read):
        (x, y), linears = normed(), readers()
        total, storage = loss(call, linears, y), weakref.ref(y.untyped_storage())
        del y
        assert (storage() is None) == (call is read)
        before = kernels.counts()
        results.append(torch.autograd.grad(total, [x, *(linear.weight for linear in linears)]))
        again = sum(n - before[key] for key, n in kernels.counts().items() if key[0] == "norm_scale_shift")
        assert again == (call is read)  # once for all readers
    assert equal(*results)


def test_a_graph_is_followed_twice_or_in_part() -> None:
    results = []
    for call in (as_it_is, read):
        (x, y), linears = normed(), readers()
        total = loss(call, linears, y)
        found = [
            *torch.autograd.grad(total, [linears[1].weight], retain_graph=True),
            *torch.autograd.grad(total, [x, linears[0].weight], retain_graph=True),
            *torch.autograd.grad(total, [x, *(linear.weight for linear in linears)]),
        ]
        results.append(found)
    assert equal(*results)


def test_several_gradients_come_back_at_once() -> None:
    results = []
    for call in (as_it_is, read):
        (x, y), linears = normed(), readers()
        out = torch.stack([call(linear, y) for linear in linears])
        cotangents = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        wanted = [x, *(linear.weight for linear in linears)]
        results.append(torch.autograd.grad(out, wanted, cotangents, is_grads_batched=True))
    assert equal(*results)


def test_gradients_are_differentiated() -> None:
    results = []
    for call in (as_it_is, read):
        (x, y), linears = normed(), readers()
        first = torch.autograd.grad(loss(call, linears, y), [linear.weight for linear in linears], create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, linears[0].weight])])
    assert equal(*results)


def test_a_graph_that_is_not_followed_is_gone_with_its_result() -> None:
    """Without the garbage collector."""
    _, y = normed()
    total, node = loss(read, readers(), y), weakref.ref(y.grad_fn)
    gc.disable()
    try:
        del y, total
        assert node() is None
    finally:
        gc.enable()


def test_a_scale_that_changed_in_place_is_an_error() -> None:
    x, scale, shift = inputs()
    y = norm_scale_shift(x, scale, shift)
    total = read(readers()[0], y).sum()
    scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_readers_weight_that_changed_in_place_is_an_error() -> None:
    (_, y), linear = normed(), readers()[0]
    total = read(linear, y).sum()
    with torch.no_grad():
        linear.weight.clamp_(-0.1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_compiled_autograd_has_the_same_gradients() -> None:
    """It asks for what was saved when the norm has been let go of."""
    results = []
    for call in (as_it_is, read):
        (x, y), linears = normed(), readers()
        total = loss(call, linears, y)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            total.backward()
        results.append([x.grad, *(linear.weight.grad for linear in linears)])
    assert equal(*results)


def test_a_dropout_in_place_is_seen_by_an_adapter() -> None:
    results = []
    for swapped in (False, True):
        torch.manual_seed(1)
        holder = nn.ModuleDict({"linear": nn.Linear(D, D, device=DEVICE).requires_grad_(False)})
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["linear"], init_lora_weights=False)
        layer: Any = peft.inject_adapter_in_model(config, holder)["linear"]  # type: ignore[index]
        layer.lora_dropout["default"] = nn.Dropout(0.5, inplace=True)
        if swapped:
            set_class(layer, subclass(lora_linear.LoraLinear, type(layer), "eager"))
        x, y = normed()
        torch.manual_seed(3)
        out = layer(y)
        results.append(torch.autograd.grad(out.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]))
    assert equal(*results)


def test_what_a_hook_of_the_reader_writes_counts() -> None:
    results = []
    for call in (as_it_is, read):
        (x, y), linear = normed(), readers()[0]
        linear.register_forward_pre_hook(lambda module, given: (given[0].mul_(2),))
        results.append(torch.autograd.grad(call(linear, y).square().sum(), [x, linear.weight]))
    assert equal(*results)


def test_a_norm_that_keeps_nothing_any_more_is_read() -> None:
    results = []
    for made in (False, True):
        (_, y), linear = normed(), readers()[0]
        y.sum().backward()
        found = made_again(y, linear) if made else None
        out = linear(y) if found is None else found.read_by(linear, y)
        results.append(torch.autograd.grad(out.square().sum(), [linear.weight]))
    assert equal(*results)


def test_what_was_made_again_in_part_goes_with_the_graph() -> None:
    """As what is kept without it does."""
    (_, y), linears = normed(), readers()
    total = loss(read, linears, y)
    made = y.grad_fn.made_again  # type: ignore[union-attr]
    del y
    torch.autograd.grad(total, [linears[1].weight])
    gc.disable()
    try:
        del total
        assert made() is None
    finally:
        gc.enable()


def test_it_is_kept_where_somebody_could_tell() -> None:
    x, scale, shift = inputs()
    linear = readers()[0]
    _, y = normed()
    assert made_again(y, linear) is not None
    assert made_again(y, nn.Sequential(linear)) is None
    with torch.no_grad():
        assert made_again(y, linear) is None
    with torch.autograd.graph.save_on_cpu():
        assert made_again(y, linear) is None
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        assert made_again(y, linear) is None
    with torch.no_grad():
        y.mul_(2)
    assert made_again(y, linear) is None
    assert made_again(norm_scale_shift(x.detach(), scale, shift), linear) is None  # which keeps nothing
    assert made_again(norm_scale_shift(x, scale, shift, weight=torch.ones(D, device=DEVICE)), linear) is None  # FSDP may take it away
    assert made_again(scale_residual(x, x, scale), linear) is None
    assert made_again(y + 1, linear) is None


@pytest.mark.parametrize("name", ["qwen-image", "wan-t2v", "flux", "z-image"])
def test_the_lora_of_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny.load(name, torch.float32).requires_grad_(False).to(DEVICE)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    arguments = moved(tiny.inputs(name, 2, torch.float32), DEVICE)
    patch_model(model)
    storages: list[weakref.ref[torch.UntypedStorage]] = []
    for path, module in model.named_modules():
        if path.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, given: storages.append(weakref.ref(given[0].untyped_storage())))

    def gradients() -> tuple[int, list[Tensor]]:
        storages.clear()
        with sdpa_kernel([SDPBackend.MATH]):  # the gradients of the others depend on the order of threads
            total = tiny.joined(model(**arguments, return_dict=False)).square().sum()
        kept = sum(storage() is not None for storage in storages)
        return kept, list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True))

    found, gradients_found = gradients()
    monkeypatch.setattr(lora_linear, "made_again", lambda y, reader: None)
    expected, gradients_expected = gradients()
    if name in ("qwen-image", "wan-t2v"):
        assert found < expected
    for a, b in zip(gradients_found, gradients_expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
