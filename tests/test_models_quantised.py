"""Models with quantised weights: patched they keep the bits of torchao's own, and quantise what several layers read once."""

from typing import Any

import pytest
import torch
from support import quantised, tiny
from support.quantised import LAWS
from torch import Tensor, nn

from ditnorm import kernels, patch_model, unpatch_model
from ditnorm.fused.quantized_linear import QuantizedLinear
from ditnorm.ops.quantization import FLOAT8_ROW, Law

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DTYPE = torch.bfloat16
NAMES = ("wan-t2v", "wan-vace", "qwen-image", "hunyuan-video", "hunyuan-video-token-replace", "hunyuan-video-1.5")


def in_blocks(name: str) -> bool:
    return "blocks." in name and "refiner" not in name


def model_of(name: str, law: Law) -> nn.Module:
    return quantised.quantise(tiny.load(name, DTYPE), law, in_blocks)


def run(model: nn.Module, name: str) -> Tensor:
    return tiny.run(model, tiny.inputs(name, 2, DTYPE))


def calls_of(model: nn.Module, name: str) -> dict[str, int]:
    before = kernels.counts()
    run(model, name)
    found: dict[str, int] = {}
    for (op, path), n in kernels.counts().items():
        found[op] = found.get(op, 0) + n - before[op, path]
    return found


def fused_linears(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


def same(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, NaN included: a row of zeros, as of masked text, has no float8 values."""
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_patched_model_has_the_bits_of_torchao(name: str, law: Law) -> None:
    model = model_of(name, law)
    expected = run(model, name)
    patch_model(model)
    assert same(run(model, name), expected)
    assert fused_linears(model)
    unpatch_model(model)
    assert not fused_linears(model)
    assert same(run(model, name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_activation_is_quantised_by_torchao(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(model_of(name, FLOAT8_ROW))
    from torchao.quantization import Float8Tensor

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torchao quantised an activation")

    monkeypatch.setattr(Float8Tensor, "from_hp", refuse)
    run(model, name)
