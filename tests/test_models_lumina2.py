"""Lumina-Image 2.0, patched."""

import pytest
import torch
from support import tiny

from ditnorm import kernels, patch_model, report

NAME = "lumina2"


def test_a_hook_on_the_silu_sees_its_values():
    model, arguments = tiny.load(NAME, torch.bfloat16), tiny.inputs(NAME, 1, torch.bfloat16)
    seen = []
    model.layers[0].feed_forward.silu.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)
    assert torch.equal(*seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_silu_in_float32_rounds_as_pytorchs_does(dtype, device):
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    assert torch.equal(torch.nn.functional.silu(every.float()).to(dtype), torch.nn.functional.silu(every))


def test_every_norm_but_the_texts_first_is_ours():
    model, arguments = tiny.load(NAME, torch.bfloat16), tiny.inputs(NAME, 1, torch.bfloat16)
    patch_model(model, strict=True)
    before = kernels.counts()
    tiny.run(model, arguments)
    calls = {op: n - before[op, path] for (op, path), n in kernels.counts().items() if n != before[op, path]}
    assert calls["norm_scale_residual_norm_scale_shift"] == 4


def test_the_report_says_that_upstream_rotates():
    model = patch_model(tiny.load(NAME, torch.bfloat16), strict=True)
    (found,) = report(model).transformers
    assert (found.attentions, found.rotated) == (4, 0)
    reason = "rotary embedding, as its tables are complex128, and upstream multiplies in float64"
    assert found.left == {reason: [name for name, module in model.named_modules() if name.endswith(".attn")]}
    text = " ".join(str(report(model)).split())
    assert f"{reason}: " in text
    assert "query and key normed in one call in 4 attention modules" in text
