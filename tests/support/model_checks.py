"""What every tiny model must do when it is patched; tests/test_models.py calls these."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditnorm import kernels
from ditnorm.patching import patch_model, unpatch_model

from . import tiny

_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])]


def bit_identical(name: str, dtype: torch.dtype, batch: int, device: str) -> None:
    """The default rounding gives the bits of the unpatched model, in the expected number of fused
    calls.
    """
    model, arguments = tiny.load(name, dtype).to(device), moved(tiny.inputs(name, batch, dtype), device)
    expected = tiny.run(model, arguments)

    patch_model(model, strict=True)
    tiny.run(model, arguments)  # the first of a process on a GPU also compares activations
    before = kernels.counts()
    output = tiny.run(model, arguments)
    calls = {key: n - before[key] for key, n in kernels.counts().items()}

    assert expected.isfinite().all()
    assert torch.equal(output, expected)
    on_gpu = device == "cuda" and kernels.unavailable is None
    activations = sum(calls.pop((op, path)) for op in ("gelu", "swiglu") for path in (kernels.path, "reference"))
    assert activations == tiny.MODELS[name].activations
    found = tuple(sum(n for (op, _), n in calls.items() if op == wanted) for wanted in kernels.OPS)
    assert found == (*tiny.MODELS[name].calls, *[0] * (len(found) - len(tiny.MODELS[name].calls)))
    if on_gpu:
        assert not any(n for (_, path), n in calls.items() if path == "reference")


def no_less_accurate(name: str, dtype: torch.dtype, device: str) -> None:
    """``rounding="single"`` is as near to a float32 run of the same weights as the unpatched model
    is.

    Where its roundings are the unpatched model's (Wan), chance decides for each input which is
    nearer: of the mean ratio of the two distances, five standard errors are allowed, which 16
    equally accurate inputs exceed once in ten thousand times.
    """
    model = tiny.load(name, dtype).to(device)
    samples = [moved(arguments, device) for arguments in independent_inputs(name, dtype)]
    unpatched = [tiny.run(model, sample) for sample in samples]
    patch_model(model, strict=True, rounding="single")
    patched = [tiny.run(model, sample) for sample in samples]
    unpatch_model(model)
    model.float()
    exact = [tiny.run(model, moved(sample, torch.float32)) for sample in samples]

    ratios = [_distance(p, e) / _distance(u, e) for p, u, e in zip(patched, unpatched, exact, strict=True)]
    assert statistics.mean(ratios) <= 1 + 5 * statistics.stdev(ratios) / math.sqrt(len(ratios)), ratios


NOISE_LEVELS = frozenset({"t", "timestep", "audio_timestep", "sigma"})


def independent_inputs(name: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """16 batches, each at a noise level of its own.

    Batches of one level have modulations in common, and with them how ``1 + scale`` is rounded,
    which ``"single"`` leaves out: one such rounding that happens to undo another would count 16
    times. Some models multiply levels by 1000; float16 holds those of these.
    """
    batches = [tiny.inputs(name, 2, dtype, seed) for seed in range(16)]
    for nth, batch in enumerate(batches, 1):
        for key in NOISE_LEVELS & batch.keys():
            levels = batch[key]
            highest = 1 if levels.max() <= 1 else 1000
            batch[key] = (levels.sign() * (highest * nth / 16)).to(levels.dtype)
    return batches


def restored(name: str, dtype: torch.dtype) -> None:
    """Patching stores nothing on modules; unpatching gives back their classes and the bits of the
    output.
    """
    model, arguments = tiny.load(name, dtype), tiny.inputs(name, 1, dtype)
    expected, classes, before = tiny.run(model, arguments), _classes(model), contents(model)

    patch_model(model, strict=True)
    tiny.run(model, arguments)
    assert _classes(model) != classes
    assert contents(model) == before
    unpatch_model(model)

    assert _classes(model) == classes
    assert contents(model) == before
    assert torch.equal(tiny.run(model, arguments), expected)


def same_gradients(name: str) -> None:
    """Training through a patched model: the gradients of the unpatched one, bit for bit.

    Not so where a modulation belongs to tokens (TI2V-5B, an index): its gradient is a sum over
    tokens, taken in another order.
    """
    model, arguments = tiny.load(name, torch.float32), tiny.inputs(name, 2, torch.float32)
    expected = _gradients(model, arguments)
    output = _gradients(patch_model(model, strict=True), arguments)
    assert expected.keys() == output.keys()
    assert [name for name in expected if not torch.equal(output[name], expected[name])] == []


def first_input(model: nn.Module, block: str, arguments: dict[str, Any], argument: int = 0) -> Tensor:
    """What the model passes to a block of it."""
    seen: list[Tensor] = []
    hook = model.get_submodule(block).register_forward_pre_hook(lambda _, args: seen.append(args[argument]))
    tiny.run(model, arguments)
    hook.remove()
    return seen[0]


def _gradients(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
    output = tiny.joined(model(**arguments, return_dict=False))
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"output": output.detach()}


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def contents(model: nn.Module, addresses: bool = True) -> list[Any]:
    """What its modules hold: names, and of tensors dtypes and addresses."""
    modules = [(name, list(module.__dict__)) for name, module in model.named_modules()]
    return [*modules, *((key, t.dtype, t.data_ptr() if addresses else None) for key, t in model.state_dict().items())]


def _distance(output: Tensor, exact: Tensor) -> float:
    return (output.float() - exact).norm().item()


def moved(value: Any, target: str | torch.dtype) -> Any:
    """Every tensor moved to a device, or every floating-point tensor to a dtype."""
    if isinstance(value, Tensor):
        return value.to(target) if isinstance(target, str) or value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: moved(item, target) for key, item in value.items()}
    return [moved(item, target) for item in value] if isinstance(value, list) else value
