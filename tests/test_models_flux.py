"""FLUX.1, patched: its ControlNets, LongCat-Image, Bria, Bria-FIBO, Ovis-Image, Chroma."""

import pytest
import torch
from support import tiny
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from ditnorm.fused import flux
from ditnorm.patching import patch_model


@pytest.mark.parametrize("norms", [("norm_q", "norm_k"), ("norm_added_q", "norm_added_k"), ("norm_q", "norm_added_q")])
def test_norms_of_query_and_key_in_another_dtype_round_as_unpatched(norms):
    name, dtype = "flux", torch.bfloat16
    model, arguments = tiny.load(name, dtype), tiny.inputs(name, 2, dtype)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        for norm in norms:
            if hasattr(block.attn, norm):
                getattr(block.attn, norm).float()
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)


@pytest.mark.parametrize("how", ["buffer", "parametrization"])
def test_norms_of_query_and_key_with_weights_elsewhere_run_as_unpatched(how):
    class Scaled(nn.Module):
        def forward(self, weight):
            return weight * 1.5

    name, dtype = "flux", torch.bfloat16
    model, arguments = tiny.load(name, dtype), tiny.inputs(name, 2, dtype)
    patched = patch_model(tiny.load(name, dtype), strict=True)
    for m in (model, patched):
        for norm in [module for path, module in m.named_modules() if path.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k"))]:
            if how == "parametrization":
                register_parametrization(norm, "weight", Scaled())
            else:
                weight = norm.weight.detach()
                del norm.weight
                norm.register_buffer("weight", weight)
    assert torch.equal(tiny.run(patched, arguments), tiny.run(model, arguments))


@pytest.mark.parametrize("name", ["flux", "longcat-image", "flux-controlnet"])
def test_the_last_projections_read_the_layout_that_upstreams_read(name):
    # A matrix product of what isn't contiguous has other bits.
    def layouts(model):
        seen = []
        linears = [m for path, m in model.named_modules() if path.endswith(("to_out.0", "to_add_out", "proj_out")) or "controlnet_" in path]
        hooks = [m.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape, args[0].stride()))) for m in linears]
        tiny.run(model, arguments)
        for hook in hooks:
            hook.remove()
        return seen

    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    expected = layouts(model)
    assert layouts(patch_model(model, strict=True)) == expected


def test_streams_that_lie_side_by_side_are_joined_without_a_copy():
    joined = torch.randn(2, 9, 4)
    text, image = joined[:, :3], joined[:, 3:]
    assert flux._side_by_side(text, image)
    assert not flux._side_by_side(image, text)
    assert not flux._side_by_side(text, image[:, 1:])
    assert not flux._side_by_side(text, image.clone())
    assert not flux._side_by_side(text[:1], image)
    assert not flux._side_by_side(joined[:, :3, :2], joined[:, 3:, :2])
    assert not flux._side_by_side(*torch.randn(9, 2, 4).transpose(0, 1).split([3, 6], dim=1))
    assert not flux._side_by_side(joined[:1, :3].expand(2, 3, 4), joined[:1, 3:].expand(2, 6, 4))
    assert flux._side_by_side(joined[:1, :3], joined[:1, 3:])
    assert not flux._side_by_side(text.clone().requires_grad_(), image)
    block = patch_model(tiny.load("flux", torch.float32)).single_transformer_blocks[0]
    assert flux.one_sequence(block, text, image).data_ptr() == joined.data_ptr()
    assert torch.equal(flux.one_sequence(block, text, image), joined)
    assert torch.equal(flux.one_sequence(block, image, text), torch.cat([image, text], dim=1))


def test_a_hook_that_writes_to_what_the_norm_is_given_changes_what_it_changes_unpatched():
    def double(module, args):
        args[0].mul_(2)

    def outputs(model):
        streams = []
        for block in model.single_transformer_blocks:
            block.register_forward_pre_hook(lambda _, args, kwargs: streams.append(kwargs["hidden_states"]), with_kwargs=True)
            block.norm.register_forward_pre_hook(double)
        return [tiny.run(model, arguments), *streams]

    arguments = tiny.inputs("flux", 2, torch.float32)
    expected = outputs(tiny.load("flux", torch.float32))
    got = outputs(patch_model(tiny.load("flux", torch.float32)))
    assert all(map(torch.equal, got, expected))


def test_tables_of_another_length_or_device_are_upstreams_affair():
    model = patch_model(tiny.load("flux", torch.float32), strict=True)
    attention = model.single_transformer_blocks[0].attn
    x, tables = torch.randn(1, 5, 192), tuple(torch.randn(2, 4, 64))
    with pytest.raises(RuntimeError, match="must match the size"):
        attention(hidden_states=x, image_rotary_emb=tables)
