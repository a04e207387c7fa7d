"""What others change on a patched model: it then computes what the unpatched model computes under
the same change.
"""

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator

import diffusers
import pytest
import torch
from diffusers.models import attention_processor, embeddings, normalization
from diffusers.models.transformers import transformer_hunyuan_video, transformer_qwenimage, transformer_wan
from support import tiny
from support.patched import DTYPE, fused_calls, is_patched, run
from torch import Tensor, nn
from torch.nn import functional as F

from ditnorm.patching import patch_model, report, unpatch_model

FAMILIES = ["wan-t2v", "qwen-image", "hunyuan-video"]
BLOCK = {"wan-t2v": "blocks.0", "qwen-image": "transformer_blocks.0", "hunyuan-video": "transformer_blocks.0"}
NORM = {"wan-t2v": "norm1", "qwen-image": "img_norm2", "hunyuan-video": "norm2"}
ATTENTION = {"wan-t2v": "attn1", "qwen-image": "attn", "hunyuan-video": "attn"}
CALLS = {name: sum(tiny.MODELS[name].calls) for name in FAMILIES}

Change = Callable[[nn.Module], object]


def block_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(BLOCK[name])


def attention_of(model: nn.Module, name: str) -> nn.Module:
    return block_of(model, name).get_submodule(ATTENTION[name])


def assert_follows(name: str, change: Change, dtype: torch.dtype = DTYPE, matters: bool = True) -> nn.Module:
    """A model changed after patching gives the bits of one that is only changed. Returns it."""
    model, upstream = tiny.load(name, dtype), tiny.load(name, dtype)
    plain = tiny.run(upstream, tiny.inputs(name, 2, dtype))
    change(upstream)
    expected = tiny.run(upstream, tiny.inputs(name, 2, dtype))
    assert not matters or not torch.equal(expected, plain)
    patch_model(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model)
    torch.testing.assert_close(tiny.run(model, tiny.inputs(name, 2, dtype)), expected, rtol=0, atol=0)
    return model


def unfused_parts(model: nn.Module) -> dict[str, list[str]]:
    """Reason -> parts, as the report has them."""
    (found,) = report(model).transformers
    return {**found.changed, **found.unfused_attentions, **found.refused}


@contextlib.contextmanager
def replaced(holder: object, name: str, value: object) -> Iterator[None]:
    original = vars(holder)[name]
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


def assert_follows_while(name: str, replacement: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """The same for a change of the whole process. Afterwards the model is as fused as before."""
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    plain = run(upstream, name)
    patch_model(model, strict=True)
    with replacement():
        expected = run(upstream, name)
        assert not torch.equal(expected, plain)
        torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)
        assert unfused_parts(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch_model(model)
        assert any("not fused" in str(warning.message) for warning in caught)
        torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), plain, rtol=0, atol=0)) == CALLS[name]
    assert not unfused_parts(model)
    assert not is_patched(unpatch_model(model))


# Forwards of norms


def fp32(self: nn.LayerNorm, x: Tensor) -> Tensor:
    """As libraries give it to norms that are to compute in float32."""
    return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype) * 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_of_a_norm_replaced_on_the_instance_is_called(name: str) -> None:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.weight is None:
                module.forward = types.MethodType(fp32, module)

    model = assert_follows(name, change)
    assert any("its forward was replaced by test_after_patching.fp32" in reason for reason in report(model).transformers[0].changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_norm_with_a_forward_of_its_own_leaves_the_other_sites_fused(name: str) -> None:
    def change(model: nn.Module) -> None:
        norm = block_of(model, name).get_submodule(NORM[name])
        norm.forward = types.MethodType(fp32, norm)

    model = assert_follows(name, change)
    assert CALLS[name] // 2 < fused_calls(lambda: run(model, name)) < CALLS[name]
    del block_of(model, name).get_submodule(NORM[name]).forward
    assert fused_calls(lambda: run(model, name)) == CALLS[name]


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("wan-t2v", normalization.FP32LayerNorm),
        ("wan-t2v", nn.RMSNorm),
        ("qwen-image", nn.LayerNorm),
        ("qwen-image", normalization.RMSNorm),
        ("hunyuan-video", nn.LayerNorm),
        ("hunyuan-video", normalization.RMSNorm),
    ],
)
def test_the_forward_of_a_norm_replaced_on_its_class_is_called(name: str, cls: type) -> None:
    original = vars(cls)["forward"]
    assert_follows_while(name, lambda: replaced(cls, "forward", lambda self, x: original(self, x) * 0.5))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["norm_q", "norm_k"])
def test_the_forward_of_a_query_or_key_norm_replaced_on_the_instance_is_called(name: str, norm: str) -> None:
    def change(model: nn.Module) -> None:
        module = attention_of(model, name).get_submodule(norm)
        forward = module.forward
        module.forward = lambda x: forward(x) * 0.5

    assert_follows(name, change)


def test_a_forward_replaced_on_the_class_that_ditnorm_made_is_called() -> None:
    # Libraries that patch type(module) find ours.
    model, upstream = tiny.load("qwen-image", DTYPE), tiny.load("qwen-image", DTYPE)
    patch_model(model, strict=True)

    def double(self: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        return tuple(2 * stream for stream in forward(self, *args, **kwargs))

    results = []
    for one in (upstream, model):
        cls = type(one.transformer_blocks[0])
        forward = cls.forward
        cls.forward = double
        try:
            results.append(run(one, "qwen-image"))
        finally:
            if "forward" in vars(cls.__bases__[0]) and cls.__module__.startswith("ditnorm"):
                del cls.forward
            else:
                cls.forward = forward
    assert torch.equal(*results)


# Forwards of blocks and attention modules


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_of_a_block_replaced_on_the_instance_is_called(name: str) -> None:
    def change(model: nn.Module) -> None:
        block = block_of(model, name)
        forward = block.forward

        def halved(*args: object, **kwargs: object) -> object:
            output = forward(*args, **kwargs)
            return tuple(o * 0.5 for o in output) if isinstance(output, tuple) else output * 0.5

        block.forward = halved

    assert_follows(name, change)


BLOCKS = {
    "wan-t2v": transformer_wan.WanTransformerBlock,
    "qwen-image": transformer_qwenimage.QwenImageTransformerBlock,
    "hunyuan-video": transformer_hunyuan_video.HunyuanVideoTransformerBlock,
}


def halving(original: Callable[..., object]) -> Callable[..., object]:
    def halved(self: object, *args: object, **kwargs: object) -> object:
        output = original(self, *args, **kwargs)
        return tuple(o * 0.5 for o in output) if isinstance(output, tuple) else output * 0.5

    return halved


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_of_a_block_replaced_on_its_class_is_called(name: str) -> None:
    cls = BLOCKS[name]
    assert_follows_while(name, lambda: replaced(cls, "forward", halving(vars(cls)["forward"])))


def test_a_method_that_the_body_inlines_is_called_where_it_was_replaced() -> None:
    cls = transformer_qwenimage.QwenImageTransformerBlock
    original = vars(cls)["_modulate"]

    def modulate(self: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        x, gate = original(self, *args, **kwargs)
        return x * 0.5, gate

    assert_follows_while("qwen-image", lambda: replaced(cls, "_modulate", modulate))
    assert_follows(
        "qwen-image",
        lambda model: setattr(model.transformer_blocks[0], "_modulate", types.MethodType(modulate, model.transformer_blocks[0])),
    )


def test_a_function_of_a_module_that_the_body_inlines_is_called_where_it_was_replaced() -> None:
    module = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
    original = module._select_modulation_rows
    model, upstream = tiny.load("qwen-image-2.1-edit", DTYPE), tiny.load("qwen-image-2.1-edit", DTYPE)
    plain = run(upstream, "qwen-image-2.1-edit")
    patch_model(model, strict=True)
    with replaced(module, "_select_modulation_rows", lambda *args, **kwargs: original(*args, **kwargs) * 0.5):
        expected = run(upstream, "qwen-image-2.1-edit")
        assert not torch.equal(expected, plain)
        assert torch.equal(run(model, "qwen-image-2.1-edit"), expected)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("wan-t2v", transformer_wan.WanAttention),
        ("qwen-image", attention_processor.Attention),
        ("hunyuan-video", attention_processor.Attention),
    ],
)
def test_the_forward_of_an_attention_module_replaced_on_its_class_is_called(name: str, cls: type) -> None:
    assert_follows_while(name, lambda: replaced(cls, "forward", halving(vars(cls)["forward"])))


@pytest.mark.parametrize(
    ("name", "cls"),
    [("hunyuan-video", normalization.AdaLayerNormZero), ("qwen-image", normalization.AdaLayerNormContinuous)],
)
def test_the_forward_of_an_adaptive_norm_replaced_on_its_class_is_called(name: str, cls: type) -> None:
    assert_follows_while(name, lambda: replaced(cls, "forward", halving(vars(cls)["forward"])))


def test_the_forward_of_a_gelu_replaced_on_its_class_is_called() -> None:
    cls = diffusers.models.activations.GELU
    model, upstream = tiny.load("wan-t2v", DTYPE), tiny.load("wan-t2v", DTYPE)
    patch_model(model, strict=True)
    for method in ("forward", "gelu"):
        with replaced(cls, method, halving(vars(cls)[method])):
            assert torch.equal(run(model), run(upstream))


# Processors and their helpers

PROCESSORS = {
    "wan-t2v": transformer_wan.WanAttnProcessor,
    "qwen-image": transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0,
    "hunyuan-video": transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_call_of_a_processor_replaced_on_its_class_is_called(name: str) -> None:
    cls = PROCESSORS[name]
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    plain = run(upstream, name)
    patch_model(model, strict=True)
    with replaced(cls, "__call__", halving(vars(cls)["__call__"])):
        expected = run(upstream, name)
        assert not torch.equal(expected, plain)
        assert torch.equal(run(model, name), expected)
        (found,) = report(model).transformers
        assert found.unfused_attentions
        patch_model(model)
        assert torch.equal(run(model, name), expected)
    patch_model(model, strict=True)
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), plain, rtol=0, atol=0)) == CALLS[name]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "module", "helper"),
    [("hunyuan-video", embeddings, "apply_rotary_emb"), ("qwen-image", transformer_qwenimage, "apply_rotary_emb_qwen")],
)
def test_a_helper_of_a_processor_replaced_before_or_after_patching_is_called(
    name: str, module: types.ModuleType, helper: str, order: str
) -> None:
    original = vars(module)[helper]
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    plain = run(upstream, name)
    if order == "after":
        patch_model(model, strict=True)
    with replaced(module, helper, lambda x, *args, **kwargs: original(x * 2, *args, **kwargs)):
        expected = run(upstream, name)
        assert not torch.equal(expected, plain)
        if order == "before":
            with pytest.warns(UserWarning, match="not fused"):
                patch_model(model)
        assert torch.equal(run(model, name), expected)


def test_a_processor_set_after_patching_is_called() -> None:
    class Halved(transformer_wan.WanAttnProcessor):
        def __call__(self, *args: object, **kwargs: object) -> Tensor:
            return super().__call__(*args, **kwargs) * 0.5

    model = assert_follows("wan-t2v", lambda model: model.blocks[0].attn1.set_processor(Halved()))
    assert fused_calls(lambda: run(model)) == CALLS["wan-t2v"] - 1


# Norms replaced by other modules


class Damped(nn.LayerNorm):
    """A user's norm."""

    def forward(self, x: Tensor, **ignored: object) -> Tensor:
        return super().forward(x) * 0.5


def set_attribute(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    setattr(parent, name, module)


def set_submodule(parent: nn.Module, name: str, module: nn.Module) -> None:
    parent.set_submodule(name, module)


def set_directly(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    parent._modules[name] = module


WAYS = [set_attribute, set_submodule, set_directly, nn.Module.add_module, nn.Module.register_module]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_norm_replaced_in_any_way_is_called(name: str, way: Callable[[nn.Module, str, nn.Module], None]) -> None:
    def change(model: nn.Module) -> None:
        parent = block_of(model, name)
        norm = parent.get_submodule(NORM[name])
        way(parent, NORM[name], Damped(norm.normalized_shape, norm.eps, elementwise_affine=False))

    model = assert_follows(name, change)
    reasons = report(model).transformers[0].changed
    assert reasons == {f"{NORM[name]}: no fused layer stands in for test_after_patching.Damped": [BLOCK[name]]}
    assert CALLS[name] // 2 < fused_calls(lambda: run(model, name)) < CALLS[name]
    with pytest.warns(UserWarning, match="no fused layer stands in for test_after_patching.Damped"):
        patch_model(model)
    assert not is_patched(unpatch_model(model))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_patching_again_fuses_a_known_norm_put_in_place_of_another(way: Callable[[nn.Module, str, nn.Module], None]) -> None:
    def change(model: nn.Module) -> None:
        way(model.transformer_blocks[0], "img_norm1", nn.LayerNorm(48, eps=0.5, elementwise_affine=False))

    model = assert_follows("qwen-image", change)
    expected = run(model, "qwen-image")
    assert fused_calls(lambda: run(model, "qwen-image")) < CALLS["qwen-image"]
    patch_model(model, strict=True)
    assert fused_calls(lambda: torch.testing.assert_close(run(model, "qwen-image"), expected, rtol=0, atol=0)) == CALLS["qwen-image"]


@pytest.mark.parametrize(("one", "other"), [("norm1", "norm3"), ("norm3", "norm1"), ("norm2", "norm3"), ("norm3", "norm2")])
def test_a_norm_put_at_another_site_is_the_norm_there(one: str, other: str) -> None:
    assert_follows("wan-t2v", lambda model: setattr(model.blocks[0], one, getattr(model.blocks[0], other)), matters=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_query_norm_replaced_directly_is_called(name: str) -> None:
    class Halved(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.eps, self.weight = norm, norm.eps, norm.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * 0.5

    assert_follows(name, lambda model: set_directly(attention_of(model, name), "norm_q", Halved(attention_of(model, name).norm_q)))


@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
def test_a_query_norm_taken_away_is_upstreams_affair(name: str) -> None:
    def outcome(model: nn.Module) -> type | Tensor:
        set_directly(attention_of(model, name), "norm_q", None)
        try:
            return run(model, name)
        except TypeError as error:
            return type(error)

    upstream, model = tiny.load(name, DTYPE), patch_model(tiny.load(name, DTYPE), strict=True)
    expected, found = outcome(upstream), outcome(model)
    assert expected is found or torch.equal(expected, found)


# Parts unpatched


@pytest.mark.parametrize(("name", "part"), [(name, f"{BLOCK[name]}.{norm}") for name, norm in NORM.items()])
def test_a_norm_unpatched_alone_is_called_as_upstreams(name: str, part: str) -> None:
    model = tiny.load(name, DTYPE)
    expected = run(model, name)
    patch_model(model, strict=True)
    unpatch_model(model.get_submodule(part))
    torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)
    patch_model(model, strict=True)
    assert fused_calls(lambda: run(model, name)) == CALLS[name]


# Attributes of norms


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_eps_of_a_norm_counts(name: str) -> None:
    model = assert_follows(name, lambda model: setattr(block_of(model, name).get_submodule(NORM[name]), "eps", 0.5))
    assert fused_calls(lambda: run(model, name)) == CALLS[name]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["norm_q", "norm_k"])
def test_a_changed_eps_of_one_query_or_key_norm_counts(name: str, norm: str) -> None:
    model = assert_follows(name, lambda model: setattr(attention_of(model, name).get_submodule(norm), "eps", 0.5))
    assert "eps" in str(report(model).transformers[0].unfused_attentions)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_eps_of_all_query_and_key_norms_counts(name: str) -> None:
    def change(model: nn.Module) -> None:
        for path, module in model.named_modules():
            if path.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
                module.eps = 0.5

    model = assert_follows(name, change)
    assert fused_calls(lambda: run(model, name)) == CALLS[name]


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_affine_given_to_a_norm_counts(name: str, parameter: str) -> None:
    def change(model: nn.Module) -> None:
        norm = block_of(model, name).get_submodule(NORM[name])
        setattr(norm, parameter, nn.Parameter(torch.linspace(0.5, 2, norm.normalized_shape[0]).to(DTYPE)))

    assert_follows(name, change)


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video"])
def test_a_bias_given_to_a_query_norm_counts(name: str) -> None:
    def change(model: nn.Module) -> None:
        norm = attention_of(model, name).norm_q
        norm.bias = nn.Parameter(torch.linspace(-1, 1, norm.weight.shape[0]).to(DTYPE))

    assert_follows(name, change)


def test_an_attribute_that_upstreams_norm_does_not_read_does_not_count() -> None:
    def change(model: nn.Module) -> None:  # torch's RMSNorm has no bias
        model.blocks[0].attn1.norm_q.bias = nn.Parameter(torch.ones(24, dtype=DTYPE))

    assert_follows("wan-t2v", change, matters=False)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", ["norm_q", "norm_k"])
def test_the_weight_of_a_query_or_key_norm_taken_away_counts(name: str, norm: str) -> None:
    assert_follows(name, lambda model: setattr(attention_of(model, name).get_submodule(norm), "weight", None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_norms_moved_to_another_dtype_compute_as_upstreams(name: str, dtype: torch.dtype) -> None:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, normalization.RMSNorm)):
                module.to(dtype)

    model, upstream = patch_model(tiny.load(name, DTYPE), strict=True), tiny.load(name, DTYPE)
    outcomes = []
    for one in (upstream, model):
        change(one)
        try:
            outcomes.append(run(one, name))
        except RuntimeError as error:
            outcomes.append(type(error))
    assert outcomes[0] is outcomes[1] or torch.equal(*outcomes)


def test_a_table_given_to_a_block_for_each_sample_counts() -> None:
    def change(model: nn.Module) -> None:
        block = model.blocks[0]
        block.scale_shift_table = nn.Parameter(torch.cat([block.scale_shift_table.data, block.scale_shift_table.data * 2]))

    assert_follows("wan-t2v", change)


# Another patcher over ours


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_derived_from_ours_runs_and_is_reported(name: str) -> None:
    def change(model: nn.Module) -> None:
        block = block_of(model, name)
        cls = type(block)
        block.__class__ = type(cls.__name__, (cls,), {"forward": halving(cls.forward), "__module__": __name__})

    model = assert_follows(name, change)
    assert any("was generated by" in reason for reason in report(model).transformers[0].changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_of_a_norm_derived_from_upstreams_is_called(name: str) -> None:
    def change(model: nn.Module) -> None:
        norm = block_of(model, name).get_submodule(NORM[name])
        norm.__class__ = Damped

    assert_follows(name, change)


# The embedding whose rows TI2V shares


def per_token_forward(
    self: nn.Module,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: object = None,
) -> tuple[Tensor]:
    """As libraries write it that shard sequences: it looks at the modulations of its own tokens."""
    batch, _, frames, height, width = hidden_states.shape
    pt, ph, pw = self.config.patch_size
    rotary, x = self.rope(hidden_states), self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
    tokens = timestep.shape[1]
    temb, modulations, text, _ = self.condition_embedder(timestep.flatten(), encoder_hidden_states, None, timestep_seq_len=tokens)
    modulations = torch.cat([part.view(batch, tokens // 2, 6, -1) for part in modulations.chunk(2, dim=1)], dim=1)
    for block in self.blocks:
        x = block(x, text, modulations, rotary)
    shift, scale = (self.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)).chunk(2, dim=2)
    x = self.proj_out((self.norm_out(x.float()) * (1 + scale.squeeze(2)) + shift.squeeze(2)).type_as(x))
    x = x.reshape(batch, frames // pt, height // ph, width // pw, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return (x.flatten(6, 7).flatten(4, 5).flatten(2, 3),)


@pytest.mark.parametrize("order", ["before", "after", "called directly"])
def test_a_forward_of_the_model_that_looks_at_the_rows_of_its_tokens_gets_them(order: str) -> None:
    model, arguments = tiny.load("wan-ti2v-text", DTYPE), tiny.inputs("wan-ti2v-text", 2, DTYPE)
    expected = tiny.run(model, arguments)
    if order != "before":
        patch_model(model, strict=True)
    if order != "called directly":
        model.forward = types.MethodType(per_token_forward, model)
    if order == "before":
        patch_model(model, strict=True)
    with torch.no_grad():
        output = per_token_forward(model, **arguments)[0] if order == "called directly" else tiny.run(model, arguments)
    assert torch.equal(output, expected)


def test_a_forward_of_the_models_class_that_looks_at_the_rows_of_its_tokens_gets_them() -> None:
    model, arguments = tiny.load("wan-ti2v-text", DTYPE), tiny.inputs("wan-ti2v-text", 2, DTYPE)
    expected = tiny.run(model, arguments)
    patch_model(model, strict=True)
    with replaced(diffusers.WanTransformer3DModel, "forward", per_token_forward):
        assert torch.equal(tiny.run(model, arguments), expected)


@pytest.mark.parametrize("where", ["instance", "class", "module"])
def test_a_block_put_behind_the_embedding_gets_the_rows_of_all_tokens(where: str) -> None:
    model, arguments = tiny.load("wan-ti2v-text", DTYPE), tiny.inputs("wan-ti2v-text", 2, DTYPE)
    expected = tiny.run(model, arguments)
    patch_model(model, strict=True)
    block = model.blocks[1]
    original = transformer_wan.WanTransformerBlock.forward

    def forward(self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        assert temb.shape[1] == 32
        return original(self, hidden_states, encoder_hidden_states, temb, rotary_emb)

    with contextlib.ExitStack() as stack:
        if where == "instance":
            block.forward = types.MethodType(forward, block)
        elif where == "class":
            stack.enter_context(replaced(transformer_wan.WanTransformerBlock, "forward", forward))
        else:
            another = copy.deepcopy(unpatch_model(copy.deepcopy(model)).blocks[1])
            another.__class__ = type("Another", (transformer_wan.WanTransformerBlock,), {"forward": forward, "__module__": __name__})
            model.blocks[1] = another
        assert torch.equal(tiny.run(model, arguments), expected)


def test_a_function_of_torch_replaced_for_the_process_is_seen_by_the_report_and_by_patching_again() -> None:
    # Not by a call, as README says.
    model, upstream = tiny.load("qwen-image", DTYPE), tiny.load("qwen-image", DTYPE)
    patch_model(model, strict=True)
    original = F.layer_norm
    with replaced(F, "layer_norm", lambda *args, **kwargs: original(*args, **kwargs) * 0.5):
        assert any("torch.nn.functional.layer_norm was replaced" in reason for reason in unfused_parts(model))
        with pytest.warns(UserWarning, match="not fused"):
            patch_model(model)
        unpatch_model(model)
        assert torch.equal(run(model, "qwen-image"), run(upstream, "qwen-image"))
