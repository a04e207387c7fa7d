"""What patched models give to their linear layers, whose bits depend on how it lies in memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

from ditnorm.patching import patch_model

# Without the norm, attention's linear layers read the stream itself, a convolution's output
# here, of which the columns lie together.
STRIDED = "wan-vace-without-cross-attn-norm"


@pytest.fixture(autouse=True)
def _strided_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    vace = tiny.MODELS["wan-vace"]
    monkeypatch.setitem(tiny.MODELS, STRIDED, replace(vace, config=vace.config | {"cross_attn_norm": False}))


@pytest.mark.parametrize("name", [*tiny.MODELS, STRIDED])
def test_linear_layers_are_given_the_layout_that_upstream_gives_them(name: str) -> None:
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    given: dict[str, list[Any]] = {}
    for path, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, path=path: given.setdefault(path, []).append(_layout(args[0])))
    tiny.run(model, arguments)
    expected, given = given, {}
    tiny.run(patch_model(model, strict=True), arguments)
    assert given == expected


def _layout(x: Tensor) -> Any:
    return x.shape, x.dtype, x.is_contiguous() or x.stride()


@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_attention_without_a_norm_before_it_reads_a_strided_stream_as_upstreams_does(batch: int, dtype: torch.dtype) -> None:
    model, arguments = tiny.load(STRIDED, dtype), tiny.inputs(STRIDED, batch, dtype)
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)
