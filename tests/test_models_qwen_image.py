"""Qwen-Image, patched: text-to-image, Edit, Edit-Plus, Layered, Inpaint, ControlNet, 2.1."""

import pytest
import torch
from support import tiny

from ditnorm.models import body_for, qwen_image, qwen_image21
from ditnorm.patching import patch_model


def test_modulation_by_index_differs_from_one_modulation():
    # zero_cond_t must matter in the tiny model, or its bit-identity says nothing of modulate_index.
    arguments = tiny.inputs("qwen-image-edit-zero-cond-t", 1, torch.float32)
    with_index = tiny.run(tiny.load("qwen-image-edit-zero-cond-t", torch.float32), arguments)
    without = tiny.run(tiny.load("qwen-image-edit", torch.float32), arguments)
    assert not torch.allclose(with_index, without, atol=0.1)


def test_a_changed_modulate_helper_is_not_recognised():
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    class Changed(QwenImageTransformerBlock):
        def _modulate(self, x, mod_params, index=None):
            return x, mod_params

    assert body_for(QwenImageTransformerBlock) is qwen_image.QwenImageTransformerBlock
    assert body_for(Changed) is None


@pytest.mark.skipif("qwen-image-2.1-edit" not in tiny.MODELS, reason="comes with diffusers 0.41.0")
def test_a_cached_prefix_holds_what_it_holds_unpatched():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    def steps(model):
        cache = QwenImage21KVCache(num_layers=3)
        first = tiny.run(model, arguments | {"kv_cache": cache, "kv_cache_mode": "extract"})
        later = tiny.run(model, arguments | {"kv_cache": cache, "kv_cache_mode": "cached", "timestep": arguments["timestep"] / 2})
        return [first, later, *(t for layer in range(3) for t in cache.get_layer(layer).get())]

    name, dtype = "qwen-image-2.1-edit", torch.bfloat16
    model, arguments = tiny.load(name, dtype), tiny.inputs(name, 2, dtype)
    expected = steps(model)
    assert all(map(torch.equal, steps(patch_model(model, strict=True)), expected))


@pytest.mark.skipif("qwen-image-2.1-edit" not in tiny.MODELS, reason="comes with diffusers 0.41.0")
def test_the_flex_processor_gets_what_it_gets_unpatched():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    name, dtype = "qwen-image-2.1-edit", torch.bfloat16
    model, arguments = tiny.load(name, dtype), tiny.inputs(name, 2, dtype)
    model.set_attn_processor(QwenImage21FlexAttnProcessor())
    expected = tiny.run(model, arguments)
    patch_model(model, strict=True)
    assert model.transformer_blocks[0].attn.fuses()
    assert torch.equal(tiny.run(model, arguments), expected)


@pytest.mark.skipif("qwen-image-2.1-edit" not in tiny.MODELS, reason="comes with diffusers 0.41.0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_query_and_key_in_another_dtype_round_as_unpatched(dtype):
    name = "qwen-image-2.1-edit"
    model, arguments = tiny.load(name, dtype), tiny.inputs(name, 2, dtype)
    for block in model.transformer_blocks:
        block.attn.norm_q.float(), block.attn.norm_k.float()
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)


@pytest.mark.skipif("qwen-image-2.1" not in tiny.MODELS, reason="comes with diffusers 0.41.0")
def test_a_changed_selection_of_rows_is_refused(monkeypatch):
    from diffusers.models.transformers import transformer_qwenimage21

    block = tiny.load("qwen-image-2.1", torch.float32).transformer_blocks[0]
    assert qwen_image21.QwenImage21TransformerBlock.unsupported(block) is None
    monkeypatch.setattr(transformer_qwenimage21, "_select_modulation_rows", lambda params, target_token_mask: params)
    assert qwen_image21.QwenImage21TransformerBlock.unsupported(block) == "this version of _select_modulation_rows is unknown"
