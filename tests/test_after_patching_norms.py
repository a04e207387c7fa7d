"""Norms that others replace, unpatch or change after patching: what they compute then counts."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models import normalization
from support import tiny
from support.after_patching import BLOCK, CALLS, FAMILIES, NORM, Damped, assert_follows, attention_of, block_of
from support.patched import DTYPE, fused_calls, is_patched, run
from torch import Tensor, nn

from ditnorm.patching import patch_model, report, unpatch_model


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
    assert reasons == {f"{NORM[name]}: no fused layer stands in for support.after_patching.Damped": [BLOCK[name]]}
    assert CALLS[name] // 2 < fused_calls(lambda: run(model, name)) < CALLS[name]
    with pytest.warns(UserWarning, match="no fused layer stands in for support.after_patching.Damped"):
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


# Unpatched alone


@pytest.mark.parametrize(("name", "part"), [(name, f"{BLOCK[name]}.{norm}") for name, norm in NORM.items()])
def test_a_norm_unpatched_alone_is_called_as_upstreams(name: str, part: str) -> None:
    model = tiny.load(name, DTYPE)
    expected = run(model, name)
    patch_model(model, strict=True)
    unpatch_model(model.get_submodule(part))
    torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)
    patch_model(model, strict=True)
    assert fused_calls(lambda: run(model, name)) == CALLS[name]


# Their attributes


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
