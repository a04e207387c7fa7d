"""Attention processors and their helpers that others replace after patching: they are called."""

import types

import pytest
import torch
from diffusers.models import attention_processor, embeddings
from diffusers.models.transformers import (
    transformer_flux,
    transformer_flux2,
    transformer_hunyuan_video,
    transformer_qwenimage,
    transformer_wan,
)
from support import tiny
from support.after_patching import CALLS, FAMILIES, assert_follows, halving, replaced
from support.patched import DTYPE, fused_calls, run
from torch import Tensor

from ditnorm.patching import patch_model, report

PROCESSORS = {
    "wan-t2v": transformer_wan.WanAttnProcessor,
    "qwen-image": transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0,
    "flux": transformer_flux.FluxAttnProcessor,
    "flux2": transformer_flux2.Flux2AttnProcessor,
    "hunyuan-video": transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0,
    "sd3.5-medium": attention_processor.JointAttnProcessor2_0,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_call_of_a_processor_replaced_on_its_class_is_called(name: str) -> None:
    cls = PROCESSORS[name]
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    plain = run(upstream, name)
    patch_model(model, strict=True)
    with replaced(cls, "__call__", halving(vars(cls)["__call__"])):
        expected = run(upstream, name)
        assert not torch.equal(expected, plain)
        assert torch.equal(run(model, name), expected)
        (found,) = report(model).transformers
        assert found.unfused_attentions
        patch_model(model)
        assert torch.equal(run(model, name), expected)
    patch_model(model, strict=True)
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), plain, rtol=0, atol=0)) == CALLS[name]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "module", "helper"),
    [
        ("hunyuan-video", embeddings, "apply_rotary_emb"),
        ("qwen-image", transformer_qwenimage, "apply_rotary_emb_qwen"),
        ("flux", transformer_flux, "apply_rotary_emb"),
        ("flux2", transformer_flux2, "apply_rotary_emb"),
    ],
)
def test_a_helper_of_a_processor_replaced_before_or_after_patching_is_called(
    name: str, module: types.ModuleType, helper: str, order: str
) -> None:
    original = vars(module)[helper]
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    plain = run(upstream, name)
    if order == "after":
        patch_model(model, strict=True)
    with replaced(module, helper, lambda x, *args, **kwargs: original(x * 2, *args, **kwargs)):
        expected = run(upstream, name)
        assert not torch.equal(expected, plain)
        if order == "before":
            with pytest.warns(UserWarning, match="not fused"):
                patch_model(model)
        assert torch.equal(run(model, name), expected)


def test_a_processor_set_after_patching_is_called() -> None:
    class Halved(transformer_wan.WanAttnProcessor):
        def __call__(self, *args: object, **kwargs: object) -> Tensor:
            return super().__call__(*args, **kwargs) * 0.5

    model = assert_follows("wan-t2v", lambda model: model.blocks[0].attn1.set_processor(Halved()))
    assert fused_calls(lambda: run(model)) == CALLS["wan-t2v"] - 1
