"""Peak memory of a forward pass: what patching keeps alive at the same time."""

import weakref

import pytest
import torch
from support import tiny
from support.live_bytes import LiveBytes
from torch.utils._pytree import tree_leaves

from ditnorm import patch_model


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_patched_forward_pass_holds_no_more_memory(name: str) -> None:
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)

    def peak() -> int:
        tiny.run(model, arguments)  # fills caches of the model's own
        held = [*model.parameters(), *model.buffers(), *(a for a in tree_leaves(arguments) if isinstance(a, torch.Tensor))]
        with LiveBytes(iter(held)) as live:
            tiny.run(model, arguments)
        return live.peak

    upstream = peak()
    patch_model(model, strict=True)
    assert peak() <= upstream


@pytest.mark.parametrize(
    ("name", "block", "projection", "mlp"),
    [
        ("qwen-image", "transformer_blocks.0", "attn.to_out.0", "img_mlp"),
        ("qwen-image", "transformer_blocks.0", "attn.to_add_out", "txt_mlp"),
        ("qwen-image-2.1", "transformer_blocks.0", "attn.to_out.0", "img_mlp"),
        ("wan-t2v", "blocks.0", "attn2.to_out.0", "ffn"),
        ("hunyuan-video", "transformer_blocks.0", "attn.to_out.0", "ff"),
        ("flux", "transformer_blocks.0", "attn.to_out.0", "ff"),
        ("chroma", "transformer_blocks.0", "attn.to_out.0", "ff"),
        ("flux2", "transformer_blocks.0", "attn.to_out.0", "ff"),
        ("sd3.5-medium", "transformer_blocks.0", "attn.to_out.0", "ff"),
        ("z-image", "layers.0", "attention.to_out.0", "feed_forward"),
        ("lumina2", "layers.0", "attn.to_out.0", "feed_forward"),
        ("ltx2", "transformer_blocks.0", "attn2.to_out.0", "ff"),
    ],
)
def test_attentions_result_is_freed_before_the_mlp(name: str, block: str, projection: str, mlp: str) -> None:
    """Memory peaks in the MLP, and nothing reads it any more."""
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    patch_model(model, strict=True)
    results: list[weakref.ref[torch.UntypedStorage]] = []
    alive: list[bool] = []
    part = model.get_submodule(block)
    part.get_submodule(projection).register_forward_hook(
        lambda module, given, result: results.append(weakref.ref(result.untyped_storage()))
    )
    part.get_submodule(mlp).register_forward_pre_hook(lambda module, given: alive.append(results[-1]() is not None))
    tiny.run(model, arguments)
    assert alive == [False]
