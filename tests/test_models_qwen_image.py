"""Qwen-Image, patched: text-to-image, Edit, Edit-Plus, Layered, Inpaint, ControlNet."""

import model_checks
import pytest
import tiny
import torch

from ditnorm.models import body_for, qwen_image
from ditnorm.patching import patch_model

NAMES = [name for name in tiny.MODELS if name.startswith("qwen-image")]


@pytest.mark.parametrize("device", model_checks.DEVICES)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_patched_output_is_bit_identical(name, dtype, batch, device):
    model_checks.bit_identical(name, dtype, batch, device)


@pytest.mark.parametrize("device", model_checks.DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_single_rounding_is_no_less_accurate_than_unpatched(name, dtype, device):
    model_checks.no_less_accurate(name, dtype, device)


@pytest.mark.parametrize("name", NAMES)
def test_unpatching_restores_the_model(name):
    model_checks.restored(name, torch.bfloat16)


def test_gradients_are_those_of_the_unpatched_model():
    model_checks.same_gradients("qwen-image")


def test_modulation_by_index_differs_from_one_modulation():
    # zero_cond_t must matter in the tiny model, or its bit-identity says nothing of modulate_index.
    arguments = tiny.inputs("qwen-image-edit-zero-cond-t", 1, torch.float32)
    with_index = tiny.run(tiny.load("qwen-image-edit-zero-cond-t", torch.float32), arguments)
    without = tiny.run(tiny.load("qwen-image-edit", torch.float32), arguments)
    assert not torch.allclose(with_index, without, atol=0.1)


def test_overflow_in_half_precision_is_clipped_as_upstream_does():
    name, dtype = "qwen-image", torch.float16
    model, arguments = tiny.load(name, dtype), tiny.inputs(name, 1, dtype)
    blocks = []
    for block in model.transformer_blocks:
        with torch.no_grad():
            block.img_mlp.net[-1].weight.mul_(3e4)
            block.txt_mlp.net[-1].weight.mul_(3e4)
        block.register_forward_hook(lambda _module, _args, streams: blocks.append(streams))
    tiny.run(model, arguments)
    tiny.run(patch_model(model, strict=True), arguments)

    expected, patched = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
    assert any((stream.abs() == 65504).any() for streams in expected for stream in streams)
    for ours, theirs in zip(patched, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_changed_modulate_helper_is_not_recognised():
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    class Changed(QwenImageTransformerBlock):
        def _modulate(self, x, mod_params, index=None):
            return x, mod_params

    assert body_for(QwenImageTransformerBlock) is qwen_image.QwenImageTransformerBlock
    assert body_for(Changed) is None
