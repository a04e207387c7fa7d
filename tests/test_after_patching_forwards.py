"""Forwards of norms, blocks and attention modules replaced after patching: they are called."""

import types

import diffusers
import pytest
import torch
from diffusers.models import attention, attention_processor, normalization
from diffusers.models.transformers import (
    transformer_flux,
    transformer_flux2,
    transformer_hunyuan_video,
    transformer_qwenimage,
    transformer_wan,
)
from support import tiny
from support.after_patching import (
    CALLS,
    FAMILIES,
    NORM,
    assert_follows,
    assert_follows_while,
    attention_of,
    block_of,
    halving,
    replaced,
)
from support.patched import DTYPE, fused_calls, run
from torch import Tensor, nn
from torch.nn import functional as F

from ditnorm.patching import patch_model, report


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
    assert any(
        "its forward was replaced by test_after_patching_forwards.fp32" in reason for reason in report(model).transformers[0].changed
    )


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
        ("sd3.5-medium", nn.LayerNorm),
        ("flux", nn.RMSNorm),
        ("sd3.5-medium", normalization.RMSNorm),
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


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("wan-t2v", "layer_norm"),
        ("wan-t2v", "rms_norm"),
        ("qwen-image", "layer_norm"),
        ("hunyuan-video", "layer_norm"),
        ("sd3.5-medium", "layer_norm"),
        ("flux", "rms_norm"),
        ("flux2", "layer_norm"),
    ],
)
def test_a_function_of_torch_replaced_for_the_process_is_called(name: str, function: str) -> None:
    original = getattr(F, function)
    assert_follows_while(name, lambda: replaced(F, function, lambda *args, **kwargs: original(*args, **kwargs) * 0.5))


def test_a_function_of_torch_that_a_norm_does_not_call_changes_nothing() -> None:
    model = patch_model(tiny.load("qwen-image", DTYPE), strict=True)
    with replaced(F, "rms_norm", lambda *args, **kwargs: pytest.fail("no norm of Qwen-Image calls it")):
        assert fused_calls(lambda: run(model, "qwen-image")) == CALLS["qwen-image"]


# Blocks and attention modules


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
    "flux": transformer_flux.FluxTransformerBlock,
    "flux2": transformer_flux2.Flux2TransformerBlock,
    "hunyuan-video": transformer_hunyuan_video.HunyuanVideoTransformerBlock,
    "sd3.5-medium": attention.JointTransformerBlock,
}


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
    [
        ("hunyuan-video", normalization.AdaLayerNormZero),
        ("qwen-image", normalization.AdaLayerNormContinuous),
        ("sd3.5-medium", normalization.SD35AdaLayerNormZeroX),
        ("flux", normalization.AdaLayerNormZeroSingle),
    ],
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
