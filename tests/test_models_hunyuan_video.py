"""HunyuanVideo, patched: text-to-video, token replacement, Framepack, HunyuanVideo-1.5,
HunyuanImage.
"""

import pytest
import torch
from support import model_checks, tiny

NAMES = [name for name in tiny.MODELS if name.startswith("hunyuan-")]


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
    model_checks.same_gradients("hunyuan-video")


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-token-replace", "hunyuan-video-1.5"])
def test_the_models_pass_channel_strided_streams(name):
    # So that their bit-identity above covers such streams, whatever the batch.
    for batch in tiny.BATCHES:
        stream = model_checks.first_input(tiny.load(name, torch.bfloat16), "transformer_blocks.0", tiny.inputs(name, batch, torch.bfloat16))
        assert stream.stride(-1) != 1


def test_replaced_tokens_have_a_modulation_of_their_own():
    # token_replace must matter in the tiny model, or its bit-identity says nothing of the row
    # index.
    arguments = tiny.inputs("hunyuan-video", 1, torch.float32)
    replaced = tiny.run(tiny.load("hunyuan-video-token-replace", torch.float32), arguments)
    plain = tiny.run(tiny.load("hunyuan-video", torch.float32), arguments)
    assert not torch.allclose(replaced[:, :, 0], plain[:, :, 0], atol=0.1)
