"""The activation of a single-stream block, joined with attention's result by one kernel, and
SwiGLU: with the same bits, upstream's where somebody looks at it, and reported either way.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from support import tiny
from torch import Tensor, nn

from ditnorm import kernels, patch_model, report
from ditnorm.fused import activation, activation_sites
from ditnorm.fused.activation import join_mlp, silu_gated, start_mlp
from ditnorm.patching.units import find_units

DTYPE = torch.bfloat16
JOINED = {"hunyuan-video": 2, "hunyuan-video-token-replace": 2}
"""Single-stream blocks of the tiny models."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, device: str) -> Counter[str]:
    """Counts the calls of the ops. On the CPU, where no kernel serves them, their references do."""
    found: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in ("gelu", "swiglu"):
        monkeypatch.setattr(activation, name, counting(name, getattr(activation, name)))
    if device == "cpu":
        monkeypatch.setattr(activation, "served", lambda op, x: True)
    else:
        for op in ("gelu", "swiglu"):
            assert activation.served(op, torch.ones(1, 8, device=device, dtype=DTYPE))
    return found


def run(model: nn.Module, name: str, device: str) -> Tensor:
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in tiny.inputs(name, 1, DTYPE).items()}
    return tiny.run(model, inputs)


@pytest.mark.parametrize("name", JOINED)
def test_blocks_of_patched_models_join_their_activation(name: str, calls: Counter[str], device: str) -> None:
    model = tiny.load(name, DTYPE).to(device)
    expected = run(model, name, device)
    assert calls["gelu"] == 0
    assert torch.equal(run(patch_model(model), name, device), expected)
    assert calls["gelu"] == JOINED[name]


def test_a_hook_on_the_activation_sees_its_values(calls: Counter[str], device: str) -> None:
    name = "hunyuan-video"
    model = tiny.load(name, DTYPE).to(device)
    seen: list[Tensor] = []
    model.single_transformer_blocks[0].act_mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = run(model, name, device)
    assert torch.equal(run(patch_model(model), name, device), expected)
    assert torch.equal(*seen)
    assert calls["gelu"] == JOINED[name] - 1


def test_a_gelu_or_silu_replaced_for_all_is_called(calls: Counter[str], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 16, device=device)
    linear, gelu = nn.Linear(16, 32, device=device), nn.GELU(approximate="tanh")
    monkeypatch.setattr(F, "gelu", lambda x, **kwargs: x * 2)
    monkeypatch.setattr(F, "silu", lambda x, **kwargs: x * 3)
    with torch.no_grad():
        assert torch.equal(join_mlp(x, *start_mlp(gelu, linear, x, "eager"), "eager", linear), torch.cat([x, linear(x) * 2], -1))
        assert torch.equal(silu_gated(x, x, rounding="eager"), 3 * x * x)
    assert not calls


@pytest.mark.parametrize("other", [nn.GELU(), nn.SiLU(), nn.Identity()], ids=str)
def test_another_activation_is_called(other: nn.Module, calls: Counter[str], device: str) -> None:
    x, linear = torch.randn(2, 3, 16, device=device), nn.Linear(16, 32, device=device)
    with torch.no_grad():
        expected = torch.cat([x, other(linear(x))], -1)
        assert torch.equal(join_mlp(x, *start_mlp(other, linear, x, "eager"), "eager", linear), expected)
    assert not calls


def test_silu_gated_is_the_expression(calls: Counter[str], device: str) -> None:
    x, value, beside = torch.randn(3, 2, 3, 16, device=device, dtype=DTYPE)
    assert torch.equal(silu_gated(x, value, rounding="eager"), F.silu(x) * value)
    assert torch.equal(silu_gated(x, value, beside, rounding="eager"), torch.cat([beside, F.silu(x) * value], -1))
    assert calls == {"swiglu": 2}


def test_silu_gated_under_grad_is_the_expression(calls: Counter[str], device: str) -> None:
    given = [t.requires_grad_() for t in torch.randn(3, 2, 3, 16, device=device, dtype=DTYPE).unbind()]
    x, value, beside = given
    y, expected = silu_gated(x, value, beside, rounding="eager"), torch.cat([beside, F.silu(x) * value], -1)
    assert calls == {"swiglu": 1}
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, given, dy), strict=True):
        assert torch.equal(a, b)


def test_without_a_kernel_nothing_is_held_longer_than_upstream_holds_it() -> None:
    """The inner tensor is overwritten where it can be: it isn't kept beside its GELU."""
    x, linear = torch.randn(2, 3, 16), nn.Linear(16, 32)
    with torch.no_grad():
        inner, pending = start_mlp(nn.GELU(approximate="tanh"), linear, x, "eager")
        assert not pending
        assert torch.equal(inner, F.gelu(linear(x), approximate="tanh"))


@pytest.mark.gpu
def test_where_the_kernel_has_other_bits_pytorchs_operations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_sites, "_known", {})
    monkeypatch.setattr(activation_sites, "gelu", lambda x, beside=None, **options: 1.01 * F.gelu(x, approximate="tanh"))
    assert not activation.served("gelu", torch.ones(1, 8, device="cuda"))
    assert activation.served("swiglu", torch.ones(1, 8, device="cuda"))
    model = patch_model(tiny.load("flux", DTYPE).to("cuda"))
    (found,) = report(model).transformers
    reason = "the kernel has other bits than this PyTorch's gelu on this GPU"
    assert found.unfused_activations == {reason: [f"single_transformer_blocks.{i}.act_mlp" for i in range(2)]}
    assert str(found.verification).startswith("bit-identical")


# The report


class _Calls(torch.overrides.TorchFunctionMode):
    """Notes which activations of PyTorch a run calls inside of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.found = 0, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.gelu, F.silu) and args[0].dim() > 2:  # those of a modulation have no tokens
            self.found += self.inside > 0
        return function(*args, **(kwargs or {}))


def activations_in_blocks(model: nn.Module, name: str) -> int:
    """How many a forward of the unpatched model calls."""
    calls = _Calls()
    for unit in find_units(model):
        if unit.is_block:
            unit.module.register_forward_pre_hook(lambda module, args: setattr(calls, "inside", calls.inside + 1))
            unit.module.register_forward_hook(lambda module, args, output: setattr(calls, "inside", calls.inside - 1))
    with calls:
        run(model, name, "cpu")
    return calls.found


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_the_report_has_every_activation_of_every_model(name: str) -> None:
    """So a body can't leave one out unnoticed, as those of feed-forward layers with SwiGLU once
    were.
    """
    model = tiny.load(name, DTYPE)
    (found,) = report(model).transformers
    reported = [activation for unit in find_units(model) for activation in unit.activations()]
    assert found.unfused_activations == {}
    assert sum(found.activations.values()) == len(reported)
    of_blocks = [activation for unit in find_units(model) if unit.is_block for activation in unit.activations()]
    assert len(of_blocks) == activations_in_blocks(model, name)


@pytest.mark.parametrize("name", [name for name, model in tiny.MODELS.items() if model.activations])
def test_every_declared_activation_runs_and_is_counted(name: str) -> None:
    model = patch_model(tiny.load(name, DTYPE), strict=True)
    (found,) = report(model).transformers
    assert sum(n for how, n in found.activations.items() if how != "GELU in place") == tiny.MODELS[name].activations
    before = counted()
    run(model, name, "cpu")
    assert counted() - before == tiny.MODELS[name].activations


def counted() -> int:
    """Calls of the ops, on either path."""
    return sum(n for (op, _), n in kernels.counts().items() if op in ("gelu", "swiglu"))


def replaced_class(path: str) -> Callable[[nn.Module], None]:
    """Puts a module of another class in the place of one."""

    def replace(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Tanh())

    return replace


def hooked(path: str) -> Callable[[nn.Module], None]:
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, args, output: None) and None


def wrapped(path: str) -> Callable[[nn.Module], None]:
    def wrap(model: nn.Module) -> None:
        module = model.get_submodule(path)
        module.forward = functools.partial(type(module).forward, module)

    return wrap


def test_an_activation_whose_hooks_are_gone_is_fused_again() -> None:
    """They leave its class's own forward in the instance."""
    gelu = nn.GELU(approximate="tanh")
    gelu.forward = type(gelu).forward.__get__(gelu)  # type: ignore[method-assign]
    assert activation.describe_joined_gelu("act_mlp", gelu).reason is None


PLACES = {
    "flux": "single_transformer_blocks.0.act_mlp",
    "flux2": "transformer_blocks.1.ff.act_fn.gate_fn",
    "hunyuan-video": "single_transformer_blocks.1.act_mlp",
    "lumina2": "layers.0.feed_forward.silu",
    "ovis-image": "transformer_blocks.0.ff.net.0.activation",
    "qwen-image-2.1": "transformer_blocks.2.img_mlp.activation_fn",
}
CHANGES = {
    replaced_class: "torch.nn.modules.activation.Tanh is not ",
    hooked: "watched by a hook, which is shown upstream's own values",
    wrapped: "its forward is wrapped or replaced",
}


@pytest.mark.parametrize("name", [name for name in PLACES if name in tiny.MODELS])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("patched_first", [True, False])
def test_an_activation_that_stays_upstreams_is_reported_with_the_reason(name: str, change: Any, patched_first: bool) -> None:
    model, upstreams = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    change(PLACES[name])(upstreams)
    expected = run(upstreams, name, "cpu")
    if patched_first:
        patch_model(model)
    change(PLACES[name])(model)
    if not patched_first and change is not hooked:
        with pytest.warns(UserWarning, match=f"{PLACES[name]} not fused: {CHANGES[change]}"):
            patch_model(model)
    patch_model(model)
    before = counted()
    assert torch.equal(run(model, name, "cpu"), expected)
    assert counted() - before == tiny.MODELS[name].activations - 1
    (found,) = report(model).transformers
    ((reason, names),) = found.unfused_activations.items()
    assert reason.startswith(CHANGES[change])
    assert names == [PLACES[name]]
    assert f"activations {PLACES[name]}: {reason}" in " ".join(str(report(model)).split())


@pytest.mark.parametrize("name", [name for name in PLACES if name in tiny.MODELS])
def test_strict_patching_fails_where_an_activation_cant_be_fused(name: str) -> None:
    model = tiny.load(name, DTYPE)
    replaced_class(PLACES[name])(model)
    with pytest.raises(RuntimeError, match=f"nothing was patched: model: {PLACES[name]} not fused"):
        patch_model(model, strict=True)


def test_a_function_that_was_replaced_for_all_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny.load("z-image-small", DTYPE))
    gelus = patch_model(tiny.load("wan-t2v", DTYPE))
    silu, gelu = F.silu, F.gelu
    monkeypatch.setattr(F, "silu", lambda x, inplace=False: silu(x))
    monkeypatch.setattr(F, "gelu", lambda x, **options: gelu(x, **options))
    for patched, function, count in ((model, "silu", 4), (gelus, "gelu", 3)):
        (found,) = report(patched).transformers
        ((reason, names),) = found.unfused_activations.items()
        assert reason.startswith(f"torch.nn.functional.{function} was replaced by test_models_activation.")
        assert len(names) == count


class AnotherSwiGLU(diffusers.models.activations.SwiGLU):
    """A version that nobody has looked at."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 2


def test_a_feed_forward_of_an_unknown_version_is_reported() -> None:
    name = "transformer_blocks.1.ff.net.0"
    model = tiny.load("ovis-image", DTYPE)
    model.get_submodule(name).__class__ = AnotherSwiGLU
    with pytest.warns(UserWarning, match=f"{name} not fused: test_models_activation.AnotherSwiGLU is not a version that ditnorm knows"):
        patch_model(model)
    assert list(report(model).transformers[0].unfused_activations.values()) == [[name]]
