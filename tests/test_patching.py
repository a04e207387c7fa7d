"""Patching changes what blocks run and nothing else, in any order with the hooks of diffusers and accelerate, and undoes itself."""

import copy
import gc
import logging
import pickle
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.hooks
import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig, WanPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.models.transformers import transformer_wan
from torch import Tensor, nn

from ditnorm import generated, kernels, models
from ditnorm.layers import LayerNormScaleShift
from ditnorm.patching import patch_model, patch_pipeline, unpatch_model, unpatch_pipeline
from ditnorm.report import report

DTYPE = torch.bfloat16
FAMILIES = ["wan-t2v", "qwen-image", "hunyuan-video"]


@pytest.fixture
def model() -> nn.Module:
    return tiny.load("wan-t2v", DTYPE)


def run(model: nn.Module, name: str = "wan-t2v") -> Tensor:
    return tiny.run(model, tiny.inputs(name, 2, DTYPE))


def fused_calls(call: Callable[[], object]) -> int:
    before = sum(kernels.counts().values())
    call()
    return sum(kernels.counts().values()) - before


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def is_patched(model: nn.Module) -> bool:
    return any(generated.origin_of(cls) for cls in classes(model))


# What patching does


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatching_restores_classes_attributes_and_parameters(name: str) -> None:
    model = tiny.load(name, DTYPE)
    before = classes(model), [set(vars(m)) for m in model.modules()], {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    expected = run(model, name)

    assert patch_model(model) is model
    assert [set(vars(m)) for m in model.modules()] == before[1]  # nothing is stored on instances
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == before[2]
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)) == sum(tiny.MODELS[name].calls)

    assert unpatch_model(model) is model
    after = classes(model), [set(vars(m)) for m in model.modules()], {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    assert after == before
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)) == 0


def test_patched_modules_are_still_upstreams_to_isinstance_and_by_name(model: nn.Module) -> None:
    upstream = [type(block) for block in model.blocks]
    patch_model(model)
    assert all(isinstance(block, cls) and type(block).__name__ == cls.__name__ for block, cls in zip(model.blocks, upstream, strict=True))
    assert all(isinstance(block.norm1, LayerNormScaleShift) for block in model.blocks)


def test_patching_again_changes_the_rounding_and_otherwise_nothing(model: nn.Module) -> None:
    eager = classes(patch_model(model))
    assert classes(patch_model(model)) == eager
    patch_model(model, rounding="single")
    assert {m.rounding for m in model.modules() if generated.origin_of(type(m))} == {"single"}
    assert classes(patch_model(model, rounding="eager")) == eager
    assert not is_patched(unpatch_model(unpatch_model(model)))


def test_patching_again_picks_up_a_norm_replaced_since(model: nn.Module) -> None:
    patch_model(model)
    with pytest.warns(UserWarning, match="was replaced by a FP32LayerNorm"):
        model.blocks[0].norm1 = copy.deepcopy(unpatch_model(copy.deepcopy(model)).blocks[0].norm1)
    assert generated.origin_of(type(model.blocks[0].norm1)) is None
    patch_model(model)
    assert generated.origin_of(type(model.blocks[0])) is not None
    assert generated.origin_of(type(model.blocks[0].norm1)) is not None


@pytest.mark.parametrize(("name", "norm"), [("wan-t2v", "blocks.1.norm2"), ("hunyuan-video", "transformer_blocks.1.norm1.norm")])
def test_a_norm_replaced_on_a_patched_model_runs_and_its_module_is_given_back(name: str, norm: str) -> None:
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    replacement = nn.LayerNorm(24, eps=0.5, elementwise_affine=False)
    upstream.set_submodule(norm, replacement)
    expected = run(upstream, name)
    patch_model(model)
    with pytest.warns(UserWarning, match=rf"isn't fused any more: its {norm.split('.')[-1]} was replaced by a LayerNorm"):
        model.set_submodule(norm, replacement)
    assert 0 < fused_calls(lambda: torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)) < sum(tiny.MODELS[name].calls)
    assert not is_patched(unpatch_model(model))
    assert torch.equal(run(model, name), expected)


def test_a_fused_norm_put_where_another_was_stays_fused(model: nn.Module) -> None:
    patch_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.blocks[0].norm1 = copy.deepcopy(model.blocks[1].norm1)
    assert generated.origin_of(type(model.blocks[0])) is not None


def test_other_instances_of_the_class_are_left_alone(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    patch_model(model)
    assert not is_patched(other)


def test_a_copy_of_a_patched_model_unpatches_on_its_own(model: nn.Module) -> None:
    expected = run(model)
    duplicate = copy.deepcopy(patch_model(model))
    unpatch_model(duplicate)
    assert is_patched(model)
    assert not is_patched(duplicate)
    torch.testing.assert_close(run(duplicate), expected, rtol=0, atol=0)


def test_a_pickled_patched_model_works_and_unpatches_in_a_fresh_process(model: nn.Module, tmp_path: Path) -> None:
    arguments = tiny.inputs("wan-t2v", 2, DTYPE)
    expected = run(model)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((patch_model(model), arguments, expected)))
    script = """
        import pickle, sys, torch
        model, arguments, expected = pickle.load(open(sys.argv[1], "rb"))
        import ditnorm.kernels, ditnorm.patching
        from diffusers.hooks._helpers import TransformerBlockRegistry
        with torch.no_grad():
            assert torch.equal(model(**arguments, return_dict=False)[0], expected)
            calls = sum(ditnorm.kernels.counts().values())
            assert calls > 0
            TransformerBlockRegistry.get(type(model.blocks[0]))
            ditnorm.patching.unpatch_model(model)
            assert torch.equal(model(**arguments, return_dict=False)[0], expected)
            assert sum(ditnorm.kernels.counts().values()) == calls
    """
    code = "\n".join(line.removeprefix(" " * 8) for line in script.splitlines())
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pkl")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_keeps_a_patched_model_alive() -> None:
    model = patch_model(tiny.load("wan-t2v", DTYPE))
    run(model)
    report(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_patching_logs_one_line(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ditnorm")
    unpatch_model(patch_model(model))
    patched, unpatched = (record.getMessage() for record in caplog.records)
    assert patched == "patched, rounding='eager': model (WanTransformer3DModel) 3 of 3 blocks"
    assert unpatched == "unpatched 30 modules of model (WanTransformer3DModel)"


def test_a_compiled_model_follows_patching_and_unpatching(model: nn.Module) -> None:
    torch._dynamo.reset()
    expected = run(model)
    compiled = torch.compile(model, backend="eager")
    run(compiled)
    assert patch_model(compiled) is compiled
    # Traced calls run the ops too, so the counters see them.
    assert fused_calls(lambda: torch.testing.assert_close(run(compiled), expected, rtol=0, atol=0)) > 0
    unpatch_model(compiled)
    assert fused_calls(lambda: torch.testing.assert_close(run(compiled), expected, rtol=0, atol=0)) == 0


# Hooks


class Doubling(accelerate.hooks.ModelHook):
    """Changes what it hooks, so that a lost hook shows."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


class DiffusersDoubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


class DiffusersNewForward(ModelHook):
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs) * 2


def accelerate_hook(model: nn.Module, folder: Path) -> None:
    for block in model.blocks:
        accelerate.hooks.add_hook_to_module(block, Doubling())


def accelerate_hook_appended(model: nn.Module, folder: Path) -> None:
    accelerate_hook(model, folder)
    for block in model.blocks:
        accelerate.hooks.add_hook_to_module(block, Doubling(), append=True)


def diffusers_hooks(model: nn.Module, folder: Path) -> None:
    for block in model.blocks:
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(DiffusersDoubling(), "doubling")
        registry.register_hook(DiffusersNewForward(), "new_forward")


def both_libraries(model: nn.Module, folder: Path) -> None:
    diffusers_hooks(model, folder)
    accelerate_hook(model, folder)
    for block in model.blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(DiffusersDoubling(), "last")


def sequential_offload(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def model_offload(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")


def group_offload_blocks(model: nn.Module, folder: Path) -> None:
    _group_offload(model, folder, offload_type="block_level", num_blocks_per_group=1)


def group_offload_leaves(model: nn.Module, folder: Path) -> None:
    _group_offload(model, folder, offload_type="leaf_level")


def _group_offload(model: nn.Module, folder: Path, **how: Any) -> None:
    device = torch.device("cpu")
    apply_group_offloading(model, onload_device=device, offload_device=device, offload_to_disk_path=str(folder), **how)


def layerwise_casting(model: nn.Module, folder: Path) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPE)


def first_block_cache(model: nn.Module, folder: Path) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))


FEATURES = [
    accelerate_hook,
    accelerate_hook_appended,
    diffusers_hooks,
    both_libraries,
    sequential_offload,
    model_offload,
    group_offload_blocks,
    group_offload_leaves,
    layerwise_casting,
    first_block_cache,
]


def run_twice(model: nn.Module) -> Tensor:
    """A cache skips blocks in the second call."""
    with model.cache_context("cond"):
        outputs = torch.stack([run(model), run(model)])
    model._reset_stateful_cache()
    return outputs


@pytest.mark.parametrize("order", ["patch first", "feature first"])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
def test_a_feature_keeps_working_on_a_patched_model_and_after_unpatching(
    model: nn.Module, feature: Callable[[nn.Module, Path], None], order: str, tmp_path: Path
) -> None:
    upstream = copy.deepcopy(model)
    folders = tmp_path / "upstream", tmp_path / "patched"
    feature(upstream, folders[0])
    expected = run_twice(upstream)
    plain_calls = 2 * sum(tiny.MODELS["wan-t2v"].calls)

    if order == "patch first":
        patch_model(model)
    feature(model, folders[1])
    patch_model(model, strict=True)
    calls = fused_calls(lambda: torch.testing.assert_close(run_twice(model), expected, rtol=0, atol=0))
    assert calls == (plain_calls - 12 if feature is first_block_cache else plain_calls)  # the cache skips two of three blocks once

    unpatch_model(model)
    assert not is_patched(model)
    assert fused_calls(lambda: torch.testing.assert_close(run_twice(model), expected, rtol=0, atol=0)) == 0


@pytest.mark.parametrize("order", ["unpatch first", "remove first"])
def test_hooks_may_be_removed_before_and_after_unpatching(model: nn.Module, order: str) -> None:
    expected = run(model)
    both_libraries(model, Path())
    patch_model(model)

    def remove() -> None:
        for block in model.blocks:
            registry = block._diffusers_hook
            registry.remove_hook("last")
            accelerate.hooks.remove_hook_from_module(block)
            for name in ("new_forward", "doubling"):
                registry.remove_hook(name)

    if order == "remove first":
        remove()
        assert fused_calls(lambda: torch.testing.assert_close(run(model), expected, rtol=0, atol=0)) > 0
        unpatch_model(model)
    else:
        unpatch_model(model)
        remove()
    assert fused_calls(lambda: torch.testing.assert_close(run(model), expected, rtol=0, atol=0)) == 0


def test_a_diffusers_hook_removed_from_below_another_leaves_no_stale_reference(model: nn.Module) -> None:
    # HookRegistry.remove_hook then overwrites `forward` of the upper hook and leaves its `original_forward`.
    diffusers_hooks(model, Path())
    for block in model.blocks:
        block._diffusers_hook.remove_hook("doubling")
    patch_model(model)
    for block in model.blocks:
        block._diffusers_hook.remove_hook("new_forward")
    assert fused_calls(lambda: run(model)) > 0
    unpatch_model(model)
    assert fused_calls(lambda: run(model)) == 0


def test_an_offloaded_norm_is_fused_through_its_own_hook(model: nn.Module) -> None:
    sequential_offload(model, Path())
    assert model.blocks[0].norm2.weight.device.type == "meta"
    patch_model(model)
    assert fused_calls(lambda: run(model)) == sum(tiny.MODELS["wan-t2v"].calls)


# What is refused


def test_a_block_with_a_foreign_forward_is_refused_and_the_others_are_fused(model: nn.Module) -> None:
    block = model.blocks[1]
    block.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), block)
    with pytest.warns(UserWarning, match=r"model: blocks.1 not fused: its forward was replaced by .*<lambda>"):
        patch_model(model)
    assert [generated.origin_of(type(b)) is not None for b in model.blocks] == [True, False, True]
    assert not any(generated.origin_of(type(m)) for m in block.modules())


def test_a_norm_with_a_foreign_forward_refuses_its_whole_block(model: nn.Module) -> None:
    model.blocks[0].norm3.forward = lambda x: x
    with pytest.warns(UserWarning, match=r"blocks.0 not fused: norm3: its forward was replaced by .*<lambda>"):
        patch_model(model)
    assert not is_patched(model.blocks[0])


def test_a_hooked_model_copied_by_deepcopy_is_refused(model: nn.Module) -> None:
    # The copy's wrappers still close over the hooks, and so the blocks, of the original.
    diffusers_hooks(model, Path())
    with pytest.warns(UserWarning, match="its forward calls another module, a WanTransformerBlock"):
        patch_model(copy.deepcopy(model))
    assert not is_patched(model)


def test_a_parametrized_norm_refuses_its_block_and_is_named(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(model.blocks[0].norm2, "weight", nn.Identity())
    with pytest.warns(UserWarning, match=r"norm2: its class ParametrizedFP32LayerNorm was generated by torch.nn.utils.parametrize"):
        patch_model(model)
    assert not is_patched(model.blocks[0])
    assert is_patched(model.blocks[1])


def test_a_block_sharded_by_fsdp2_is_refused_and_named(model: nn.Module, sharded: Callable[[nn.Module], None]) -> None:
    sharded(model.blocks[0])
    with pytest.warns(UserWarning, match=r"blocks.0 not fused: its class FSDPWanTransformerBlock was generated by torch.distributed.fsdp"):
        patch_model(model)
    assert not is_patched(model.blocks[0])


def test_a_block_sharded_after_patching_stays_as_it_is(model: nn.Module, sharded: Callable[[nn.Module], None]) -> None:
    patch_model(model)
    sharded(model.blocks[0])
    before = classes(model)
    with pytest.warns(UserWarning, match="FSDPWanTransformerBlock"):
        patch_model(model)
    assert classes(model) == before
    with pytest.raises(RuntimeError, match=r"nothing was unpatched: blocks.0: its class FSDPWanTransformerBlock was generated by"):
        unpatch_model(model)
    assert classes(model) == before


@pytest.fixture
def sharded() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    torch.distributed.destroy_process_group()


def test_blocks_inside_a_parallel_wrapper_are_refused(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"module.blocks.0, module.blocks.1, module.blocks.2 not fused: it is inside DataParallel"):
        patch_model(nn.DataParallel(model))
    assert not is_patched(model)


class WanTransformerBlock(transformer_wan.WanTransformerBlock):
    """A version of the block that nobody has looked at."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * 2


def test_an_unknown_version_of_a_block_is_left_alone_with_one_warning(model: nn.Module) -> None:
    for block in model.blocks:
        block.__class__ = WanTransformerBlock
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch_model(model)
    (warning,) = caught
    fingerprint = models.fingerprint.fingerprint(WanTransformerBlock.forward)
    assert f"blocks.0, blocks.1, blocks.2 not fused: {__name__}.WanTransformerBlock is not a version that ditnorm knows" in str(
        warning.message
    )
    assert f"forward {fingerprint}" in str(warning.message)
    assert not is_patched(model)


def test_strict_raises_and_changes_nothing(model: nn.Module) -> None:
    model.blocks[2].__class__ = WanTransformerBlock
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"nothing was patched: model: blocks.2 not fused"):
        patch_model(model, strict=True)
    assert classes(model) == before


def test_unpatching_is_all_or_nothing(model: nn.Module) -> None:
    patch_model(model)
    model.blocks[2].norm1.forward = lambda x, **modulation: x
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"nothing was unpatched: blocks.2.norm1: its forward was replaced by"):
        unpatch_model(model)
    assert classes(model) == before
    del model.blocks[2].norm1.forward
    assert not is_patched(unpatch_model(model))


# Arguments


def test_a_model_without_supported_blocks_is_an_error_that_lists_the_families() -> None:
    with pytest.raises(ValueError, match="nothing to fuse in Linear; supported families: HunyuanVideo, Qwen-Image, Wan"):
        patch_model(nn.Linear(2, 2))


def test_wrong_kinds_of_targets_are_type_errors(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline, got WanTransformer3DModel \(use patch_model and its like\)"):
        patch_pipeline(model)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got WanPipeline \(use patch_pipeline and its like\)"):
        patch_model(pipeline(model))  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline, got str"):
        unpatch_pipeline("wan")


def test_an_unknown_rounding_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="rounding: expected one of 'single', 'eager', got 'fast'"):
        patch_model(model, rounding="fast")


def test_kernels_that_cannot_be_used_are_warned_of_where_cuda_is_live(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "unavailable", "no compiler was found")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.warns(RuntimeWarning, match="the slower PyTorch path: no compiler was found"):
        patch_model(model)


# Pipelines


def pipeline(transformer: nn.Module, transformer_2: nn.Module | None = None) -> WanPipeline:
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer, transformer_2=transformer_2)


def test_every_transformer_of_a_pipeline_is_patched_compiled_ones_too(model: nn.Module) -> None:
    second = copy.deepcopy(model)
    pipe = pipeline(torch.compile(model, backend="eager"), second)
    assert patch_pipeline(pipe) is pipe
    assert is_patched(model)
    assert is_patched(second)
    assert unpatch_pipeline(pipe) is pipe
    assert not is_patched(model)
    assert not is_patched(second)


def test_a_refused_transformer_keeps_a_strict_pipeline_as_it_is(model: nn.Module) -> None:
    second = copy.deepcopy(model)
    second.blocks[0].__class__ = WanTransformerBlock
    with pytest.raises(RuntimeError, match=r"transformer_2: blocks.0 not fused"):
        patch_pipeline(pipeline(model, second), strict=True)
    assert not is_patched(model)
