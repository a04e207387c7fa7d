"""Wan, patched: 2.1 and 2.2, per-token modulation (TI2V-5B), WanAnimate, VACE, ChronoEdit."""

import functools
import warnings
from unittest import mock

import diffusers
import pytest
import torch
from support import model_checks, tiny
from support.tiny.wan import IMAGE_TOKENS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ditnorm import kernels, layers
from ditnorm.models import wan
from ditnorm.patching import patch_model, report, unpatch_model


def test_a_pipeline_of_half_precision_keeps_tables_and_norms_in_float32():
    # What makes the law of Wan's sites float32; a model that is cast as a whole is another case,
    # below.
    block = tiny.load("wan-t2v", torch.bfloat16).blocks[0]
    assert {block.scale_shift_table.dtype, block.norm2.weight.dtype} == {torch.float32}
    assert block.ffn.net[-1].weight.dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["wan-t2v", "wan-ti2v", "wan-vace", "wan-without-cross-attn-norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_cast_as_a_whole_is_bit_identical(name, dtype):
    model, arguments = tiny.load(name, torch.float32).to(dtype), tiny.inputs(name, 2, dtype)
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)


@pytest.mark.parametrize("name", ["wan-t2v", "wan-animate", "wan-vace", "chronoedit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_single_rounding_serves_a_model_cast_as_a_whole(name, dtype):
    # Its rotary tables are of half precision.
    model, arguments = tiny.load(name, torch.float32), tiny.inputs(name, 2, dtype)
    exact = tiny.run(model, model_checks.moved(arguments, torch.float32))
    upstream = tiny.run(model.to(dtype), arguments)
    output = tiny.run(patch_model(model, strict=True, rounding="single"), arguments)
    assert output.dtype is upstream.dtype
    assert (output - exact).norm() < 2 * (upstream - exact).norm()


@pytest.mark.parametrize(("name", "block", "argument"), [("chronoedit", "blocks.0", 0), ("wan-vace", "blocks.0", 0)])
def test_the_models_pass_channel_strided_streams(name, block, argument):
    # So that their bit-identity above covers such streams, whatever the batch.
    for batch in tiny.BATCHES:
        stream = model_checks.first_input(tiny.load(name, torch.bfloat16), block, tiny.inputs(name, batch, torch.bfloat16), argument)
        assert stream.stride(-1) != 1


@pytest.mark.parametrize("name", ["wan-i2v", "wan-animate", "chronoedit"])
def test_the_models_attend_to_tokens_of_an_image(name):
    # So that their bit-identity above covers the branch of the image, which without 512 tokens of
    # text sees none.
    tokens = model_checks.first_input(tiny.load(name, torch.bfloat16), "blocks.0.attn2.add_k_proj", tiny.inputs(name, 2, torch.bfloat16))
    assert tokens.shape[1] == IMAGE_TOKENS


class _Widest(TorchDispatchMode):
    """The largest number of values of a float32 tensor that any op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, torch.Tensor) and out.dtype is torch.float32:
                self.numel = max(self.numel, out.numel())
        return result


def test_the_per_token_modulation_is_never_made_in_float32():
    model, arguments = tiny.load("wan-ti2v", torch.bfloat16), tiny.inputs("wan-ti2v", 2, torch.bfloat16)
    all_modulations = arguments["timestep"].numel() * 6 * 24  # [B, S, 6, D]
    with _Widest() as unpatched:
        tiny.run(model, arguments)
    patch_model(model, strict=True)
    with _Widest() as patched:
        tiny.run(model, arguments)
    assert unpatched.numel == all_modulations
    assert patched.numel < all_modulations


def _modulations(model, arguments):
    """What the first block gets. Of a patched model it is asked without a hook, since a hook is
    shown the rows of all tokens.
    """
    with mock.patch.object(wan, "_modulation", wraps=wan._modulation) as calls:
        tiny.run(model, arguments)
    if calls.call_args_list:
        return calls.call_args_list[0].args[0]
    return model_checks.first_input(model, "blocks.0", arguments, argument=2)


@pytest.mark.parametrize("device", model_checks.DEVICES)
def test_tokens_of_one_timestep_share_one_row_of_modulations(device):
    # Otherwise TI2V-5B keeps 1 GB of equal rows through a forward pass, and every block reads them.
    model, arguments = tiny.load("wan-ti2v-text", torch.bfloat16).to(device), tiny.inputs("wan-ti2v-text", 2, torch.bfloat16)
    arguments = {name: value.to(device) for name, value in arguments.items()}
    every_token = _modulations(model, arguments)
    patch_model(model, strict=True)
    one_row = _modulations(model, arguments)
    assert one_row.shape == (2, 1, 6, 24)
    assert one_row.untyped_storage().nbytes() == one_row.nbytes
    assert torch.equal(one_row.expand_as(every_token), every_token)


@pytest.mark.parametrize("token", [0, 13, 31])
def test_one_token_of_another_timestep_keeps_the_rows_of_all(token):
    model, arguments = tiny.load("wan-ti2v-text", torch.bfloat16), tiny.inputs("wan-ti2v-text", 2, torch.bfloat16)
    arguments["timestep"][1, token] -= 1
    expected, every_token = tiny.run(model, arguments), _modulations(model, arguments)
    patch_model(model, strict=True)
    assert torch.equal(_modulations(model, arguments), every_token)
    assert torch.equal(tiny.run(model, arguments), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_training_keeps_the_rows_of_all_tokens(frozen):
    # The gradient of one row would be a sum over tokens, in another order than upstream's.
    model, arguments = tiny.load("wan-ti2v-text", torch.float32), tiny.inputs("wan-ti2v-text", 2, torch.float32)
    model.condition_embedder.requires_grad_(not frozen)
    patch_model(model, strict=True)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[2].shape))
    model(**arguments)
    assert seen == [(2, 32, 6, 24)]


@pytest.mark.parametrize("transform", ["vmap", "trace", "make_fx"])
def test_transforms_and_tracers_see_upstreams_embedding(transform):
    # They have no values to compare, or would keep the outcome of the comparison for all inputs.
    model, arguments = tiny.load("wan-ti2v-text", torch.float32), tiny.inputs("wan-ti2v-text", 2, torch.float32)
    expected = tiny.run(model, arguments)
    patch_model(model.requires_grad_(False), strict=True)

    def forward(*inputs):
        return model(*inputs, return_dict=False)[0]

    inputs = tuple(arguments[name] for name in ("hidden_states", "timestep", "encoder_hidden_states"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracers warn of each shape that they keep
        if transform == "vmap":
            output = torch.func.vmap(lambda *sample: forward(*(value[None] for value in sample))[0])(*inputs)
        elif transform == "trace":
            output = torch.jit.trace(forward, inputs, check_trace=False)(*inputs)
        else:
            output = make_fx(forward)(*inputs)(*inputs)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("mode", [FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta")])
def test_a_model_runs_on_tensors_without_values(mode):
    # Tools that count operations or memory do that, and there are no rows to compare.
    model, arguments = tiny.load("wan-ti2v-text", torch.float32), tiny.inputs("wan-ti2v-text", 2, torch.float32)
    if isinstance(mode, torch.device):
        model, arguments = model.to(mode), {name: value.to(mode) for name, value in arguments.items()}
    patch_model(model, strict=True)
    with mode:
        assert tiny.run(model, arguments).shape == (2, 4, 2, 8, 8)


class _PerToken(diffusers.WanTransformer3DModel):
    """A model that looks at the rows of its tokens."""

    def forward(self, *args, **kwargs):
        rows = []
        with self.condition_embedder.register_forward_hook(lambda module, args, output: rows.append(output[1].shape[1])):
            super().forward(*args, **kwargs)
        return rows


def test_a_model_that_is_not_known_gets_the_rows_of_all_tokens():
    model, arguments = tiny.load("wan-ti2v-text", torch.bfloat16), tiny.inputs("wan-ti2v-text", 2, torch.bfloat16)
    model.__class__ = _PerToken
    patch_model(model, strict=True)
    with torch.no_grad():
        assert model(**arguments) == [32]


def test_a_model_with_blocks_that_are_not_known_gets_the_rows_of_all_tokens():
    model, arguments = tiny.load("wan-ti2v-text", torch.bfloat16), tiny.inputs("wan-ti2v-text", 2, torch.bfloat16)

    class Another(type(model.blocks[1])):
        def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
            assert temb.shape[1] == 32
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)

    model.blocks[1].__class__ = Another
    expected = tiny.run(model, arguments)
    patch_model(model)
    assert torch.equal(tiny.run(model, arguments), expected)


def test_an_embedding_that_somebody_has_wrapped_is_left_alone_in_silence():
    # It only saves memory: no reason for a warning, or for an error under strict.
    model, arguments = tiny.load("wan-ti2v-text", torch.bfloat16), tiny.inputs("wan-ti2v-text", 2, torch.bfloat16)
    forward = model.condition_embedder.forward
    model.condition_embedder.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    expected, every_token = tiny.run(model, arguments), _modulations(model, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, strict=True)
    assert torch.equal(_modulations(model, arguments), every_token)
    assert torch.equal(tiny.run(model, arguments), expected)
    assert not report(model).transformers[0].refused


def test_an_embedding_whose_blocks_are_all_left_alone_is_left_alone_too():
    model, arguments = tiny.load("wan-ti2v-text", torch.bfloat16), tiny.inputs("wan-ti2v-text", 2, torch.bfloat16)
    for block in model.blocks:
        block.forward = functools.partial(type(block).forward, block)
    every_token = _modulations(model, arguments)
    with pytest.warns(UserWarning, match="not fused"):
        patch_model(model)
    assert torch.equal(_modulations(model, arguments), every_token)


def test_a_block_without_cross_attn_norm_has_a_fused_residual_there():
    model = patch_model(tiny.load("wan-without-cross-attn-norm", torch.float32), strict=True)
    assert all(isinstance(block.norm2, layers.ScaleResidualIdentity) for block in model.blocks)


def test_text_of_one_sample_serves_a_batch_of_videos_as_upstream():
    # Attention broadcasts it; the fused call takes query and key of one batch, so cross-attention
    # is left to upstream and counted.
    model, arguments = tiny.load("wan-t2v", torch.bfloat16), tiny.inputs("wan-t2v", 2, torch.bfloat16)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:1]
    expected = tiny.run(model, arguments)
    patch_model(model, strict=True)
    before = kernels.counts()["qk_norm_rope", "reference"]
    assert torch.equal(tiny.run(model, arguments), expected)
    assert kernels.counts()["qk_norm_rope", "reference"] - before == 3 * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_of_query_and_key_without_a_weight_are_across_heads(when: str) -> None:
    model, arguments = tiny.load("wan-t2v", torch.bfloat16), tiny.inputs("wan-t2v", 2, torch.bfloat16)
    if when == "after":
        patch_model(model)
    model.blocks[0].attn1.norm_q.weight = None
    model.blocks[1].attn2.norm_k.weight = None
    patched = tiny.run(patch_model(model, strict=True), arguments)
    assert torch.equal(patched, tiny.run(unpatch_model(model), arguments))


@pytest.mark.parametrize("name", ["wan-t2v", "wan-vace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_table_for_each_sample_is_added_as_upstream_adds_it(name: str, when: str) -> None:
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)
    if when == "after":
        patch_model(model)
    table = model.blocks[0].scale_shift_table
    model.blocks[0].scale_shift_table = nn.Parameter(torch.cat([table.data, 2 * table.data]))
    patched = tiny.run(patch_model(model, strict=True), arguments)
    assert torch.equal(patched, tiny.run(unpatch_model(model), arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_a_norm_before_it_gets_a_copy_where_upstream_makes_one(dtype: torch.dtype) -> None:
    model, arguments = tiny.load("wan-without-cross-attn-norm", dtype), tiny.inputs("wan-without-cross-attn-norm", 2, dtype)

    def scribble(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].mul_(0.5)

    for block in model.blocks:
        block.attn2.register_forward_pre_hook(scribble)
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)
