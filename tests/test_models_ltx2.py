"""LTX-2, 2.3 and 2.5, patched: video and audio."""

import pytest
import torch
from support import tiny

from ditnorm import patch_model

NAMES = [name for name in tiny.MODELS if name.startswith("ltx2")]


@pytest.mark.parametrize(
    "tables", [["scale_shift_table"], ["audio_a2v_cross_attn_scale_shift_table"], ["video_a2v_cross_attn_scale_shift_table"]]
)
def test_tables_kept_in_float32_promote_the_streams_as_upstream(tables):
    """The blocks' Linears take any dtype then, as quantised ones do."""
    model, arguments = tiny.load("ltx2", torch.bfloat16), tiny.inputs("ltx2", 2, torch.bfloat16)
    for block in model.transformer_blocks:
        for table in tables:
            getattr(block, table).data = getattr(block, table).data.float()
    for linear in [module for module in model.modules() if isinstance(module, torch.nn.Linear)]:
        linear.register_forward_pre_hook(lambda module, args: args[0].to(module.weight.dtype))
    expected = tiny.run(model, arguments)
    output = tiny.run(patch_model(model), arguments)
    assert output.dtype is expected.dtype
    assert torch.equal(output, expected)


def test_a_hook_on_the_norm_of_two_modulations_sees_it_called_once():
    model, arguments = tiny.load("ltx2", torch.bfloat16), tiny.inputs("ltx2", 2, torch.bfloat16)
    seen = []
    for norm in (model.transformer_blocks[0].audio_to_video_norm, model.transformer_blocks[1].video_to_audio_norm):
        norm.register_forward_hook(lambda _module, _args, output: seen.append(output))
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_attention_of_one_stream_to_the_other_alone_is_upstreams():
    """No model asks for one without the other; a block can be asked."""
    name = "ltx2.3"
    if name not in NAMES:
        pytest.skip("comes with diffusers 0.38.0")
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _module, args, kwargs: (args, kwargs | {"use_v2a_cross_attention": False}), with_kwargs=True)
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)


def test_blocks_compile_to_one_graph_each():
    model, arguments = patch_model(tiny.load("ltx2", torch.bfloat16), strict=True), tiny.inputs("ltx2", 1, torch.bfloat16)
    expected = tiny.run(model, arguments)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(tiny.run(model, arguments), expected)
