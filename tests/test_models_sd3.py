"""Stable Diffusion 3 and 3.5, patched: Large, Medium, SD3.0, ControlNets."""

import pytest
import torch
from support import tiny
from support.patched import fused_calls

from ditnorm.patching import patch_model, report


def test_a_hook_on_the_norm_of_two_modulations_sees_it_called_once():
    name = "sd3.5-medium"
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    seen = []
    model.transformer_blocks[0].norm1.norm.register_forward_hook(lambda _module, _args, output: seen.append(output))
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)
    assert len(seen) == 2
    assert torch.equal(*seen)


@pytest.mark.parametrize("dim", [0, 1])
def test_feed_forwards_in_chunks_are_those_of_the_unpatched_model(dim):
    name = "sd3.5-large"
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    model.enable_forward_chunking(chunk_size=1, dim=dim)
    calls = []
    model.transformer_blocks[0].ff.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape))
    expected = tiny.run(model, arguments)
    assert fused_calls(lambda: tiny.run(patch_model(model, strict=True), arguments)) == tiny.MODELS[name].total
    assert torch.equal(tiny.run(model, arguments), expected)
    assert calls[0][dim] == 1
    assert calls == 3 * calls[: len(calls) // 3]


@pytest.mark.parametrize("name", ["sd3.5-controlnet", "sd3.5-controlnet-without-text"])
def test_streams_keep_the_layout_that_a_controlnet_hands_to_its_linears(name):
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    strides = []
    for linear in model.controlnet_blocks:
        linear.register_forward_pre_hook(lambda _module, args: strides.append(args[0].stride()))
    tiny.run(model, arguments)
    tiny.run(patch_model(model, strict=True), arguments)
    assert strides[0][-1] != 1
    assert strides[:3] == strides[3:]


def test_attention_without_norms_of_query_and_key_is_left_alone():
    model = patch_model(tiny.load("sd3", torch.float32), strict=True)
    assert not report(model).transformers[0].unfused_attentions
    assert type(model.transformer_blocks[0].attn).__module__.startswith("diffusers.")


def test_arguments_of_the_attention_processor_reach_it():
    # As the embeddings of an IP-Adapter: diffusers warns of those that its processor doesn't take.
    name = "sd3.5-medium"
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    seen = []
    cls = type(model.transformer_blocks[0].attn.processor)

    class Listening(cls):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
            seen.append(temb)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb=temb, **kwargs)

    model.transformer_blocks[0].attn.set_processor(Listening())
    arguments["joint_attention_kwargs"] = {"temb": torch.ones(1)}
    expected = tiny.run(model, arguments)
    with pytest.warns(UserWarning, match="is not one that ditnorm knows"):
        patch_model(model)
    assert torch.equal(tiny.run(model, arguments), expected)
    assert [t.item() for t in seen] == [1, 1]


def test_blocks_compile_to_one_graph_each():
    name = "sd3.5-medium"
    model, arguments = patch_model(tiny.load(name, torch.bfloat16), strict=True), tiny.inputs(name, 1, torch.bfloat16)
    expected = tiny.run(model, arguments)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(tiny.run(model, arguments), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("heads", [24, 38])
def test_attention_has_the_same_bits_for_the_layout_that_the_fused_op_writes(heads, dtype):
    # Upstream joins the two streams to dense [B, H, S, d], the op to dense [B, S, H, d].
    generator = torch.Generator("cuda").manual_seed(0)
    streams = [torch.randn(1, 4429, heads, 64, generator=generator, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.contiguous() for t in streams))
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(*streams), expected)
