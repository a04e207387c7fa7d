"""HunyuanVideo, patched: text-to-video, token replacement, Framepack, HunyuanVideo-1.5,
HunyuanImage.
"""

import pytest
import torch
from support import model_checks, tiny


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-token-replace", "hunyuan-video-1.5"])
def test_the_models_pass_channel_strided_streams(name):
    # So that their bit-identity covers such streams, whatever the batch.
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
