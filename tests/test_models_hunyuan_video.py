"""HunyuanVideo, patched: text-to-video, token replacement, Framepack, HunyuanVideo-1.5,
HunyuanImage.
"""

from typing import Any

import pytest
import torch
from support import model_checks, tiny

from ditnorm import patch_model
from ditnorm.fused.module import upstream_of


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


@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5", "hunyuan-image"])
def test_arguments_that_upstream_takes_no_notice_of_reach_what_others_put_in_its_place(
    name: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block: Any = next(iter(getattr(patch_model(tiny.load(name, torch.float32)), blocks, [])), None)
    if block is None:
        pytest.skip("it has no such blocks")
    seen: list[Any] = []
    monkeypatch.setattr(upstream_of(type(block)), "forward", lambda self, *args, **kwargs: seen.append((args[5:], kwargs)))
    block(None, None, None, None, None, "more", another=1)
    assert seen == [(("more",), {"another": 1})]
