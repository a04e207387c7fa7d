"""FLUX.2 and FLUX.2 Klein, patched."""

import pytest
import torch
from support import tiny

from ditnorm.patching import patch_model, report


def test_a_cache_of_reference_images_holds_what_it_holds_unpatched():
    flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")
    if not hasattr(flux2, "Flux2KVCache"):
        pytest.skip("comes with diffusers 0.38.0")

    def steps(model):
        first = model(**arguments, kv_cache_mode="extract", num_ref_tokens=6, return_dict=False)
        later = {k: v[:, 6:] if k == "hidden_states" else v[6:] if k == "img_ids" else v for k, v in arguments.items()}
        output = model(**later, kv_cache=first[1], kv_cache_mode="cached", return_dict=False)[0]
        layers = [*first[1].double_block_caches, *first[1].single_block_caches]
        return [first[0], output, *(t for layer in layers for t in layer.get())]

    model, arguments = tiny.load("flux2-klein", torch.bfloat16), tiny.inputs("flux2-klein", 2, torch.bfloat16)
    for block in model.transformer_blocks:
        block.attn.set_processor(flux2.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(flux2.Flux2KVParallelSelfAttnProcessor())
    with torch.no_grad():
        expected = steps(model)
        with pytest.warns(UserWarning, match="Flux2KVAttnProcessor is not one that ditnorm knows"):
            patch_model(model)
        assert report(model).transformers[0].fused == 4
        assert all(map(torch.equal, steps(model), expected))


def test_projections_fused_by_upstream_stay_fused():
    model, arguments = tiny.load("flux2", torch.bfloat16), tiny.inputs("flux2", 2, torch.bfloat16)
    model.fuse_qkv_projections()
    expected = tiny.run(model, arguments)
    patch_model(model, strict=True)
    assert all(block.attn.fuses() for block in [*model.transformer_blocks, *model.single_transformer_blocks])
    assert torch.equal(tiny.run(model, arguments), expected)
