"""The activation of a single-stream block, joined with attention's result by one kernel: with the
same bits, and upstream's where somebody looks at it.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import tiny
from torch import Tensor, nn

from ditnorm import patch_model
from ditnorm.fused import activation
from ditnorm.fused.activation import begun, joined, silu_gated

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
        monkeypatch.setattr(activation, "served", lambda op, x: not x.requires_grad)
    else:
        for op in ("gelu", "swiglu"):
            assert activation.served(op, torch.ones(1, 8, device=device, dtype=DTYPE))
        found.clear()
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
        assert torch.equal(joined(x, *begun(gelu, linear, x, "eager"), "eager"), torch.cat([x, linear(x) * 2], -1))
        assert torch.equal(silu_gated(x, x, rounding="eager"), 3 * x * x)
    assert not calls


@pytest.mark.parametrize("other", [nn.GELU(), nn.SiLU(), nn.Identity()], ids=str)
def test_another_activation_is_called(other: nn.Module, calls: Counter[str], device: str) -> None:
    x, linear = torch.randn(2, 3, 16, device=device), nn.Linear(16, 32, device=device)
    with torch.no_grad():
        expected = torch.cat([x, other(linear(x))], -1)
        assert torch.equal(joined(x, *begun(other, linear, x, "eager"), "eager"), expected)
    assert not calls


def test_silu_gated_is_the_expression(calls: Counter[str], device: str) -> None:
    x, value, beside = torch.randn(3, 2, 3, 16, device=device, dtype=DTYPE)
    assert torch.equal(silu_gated(x, value, rounding="eager"), F.silu(x) * value)
    assert torch.equal(silu_gated(x, value, beside, rounding="eager"), torch.cat([beside, F.silu(x) * value], -1))
    assert calls == {"swiglu": 2}
    assert torch.equal(silu_gated(x.requires_grad_(), value, rounding="eager"), F.silu(x) * value)
    assert calls == {"swiglu": 2}


def test_without_a_kernel_nothing_is_held_longer_than_upstream_holds_it() -> None:
    """The inner tensor is overwritten where it can be: it isn't kept beside its GELU."""
    x, linear = torch.randn(2, 3, 16), nn.Linear(16, 32)
    with torch.no_grad():
        inner, pending = begun(nn.GELU(approximate="tanh"), linear, x, "eager")
        assert not pending
        assert torch.equal(inner, F.gelu(linear(x), approximate="tanh"))


@pytest.mark.gpu
def test_where_the_kernel_has_other_bits_pytorchs_operations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_known", {})
    monkeypatch.setattr(activation, "gelu", lambda x, beside=None, **options: 1.01 * F.gelu(x, approximate="tanh"))
    assert not activation.served("gelu", torch.ones(1, 8, device="cuda"))
    assert activation.served("swiglu", torch.ones(1, 8, device="cuda"))
