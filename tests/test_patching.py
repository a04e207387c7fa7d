"""Patching changes what blocks run and nothing else, and undoes itself."""

import copy
import gc
import logging
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from support import tiny
from support.patched import DTYPE, classes, fused_calls, is_patched, pipeline, run
from torch import nn

import ditnorm
from ditnorm import kernels
from ditnorm.layers import LayerNormScaleShift
from ditnorm.models import families
from ditnorm.patching import patch_model, patch_pipeline, report, unpatch_model, unpatch_pipeline
from ditnorm.swapping import generated

FAMILIES = ["wan-t2v", "qwen-image", "hunyuan-video"]


@pytest.fixture
def model() -> nn.Module:
    return tiny.load("wan-t2v", DTYPE)


# What patching does


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatching_restores_classes_attributes_and_parameters(name: str) -> None:
    model = tiny.load(name, DTYPE)
    before = classes(model), [set(vars(m)) for m in model.modules()], {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    expected = run(model, name)

    assert patch_model(model) is model
    assert [set(vars(m)) for m in model.modules()] == before[1]  # nothing is stored on instances
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == before[2]
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)) == tiny.MODELS[name].total

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
    with pytest.warns(UserWarning, match="was replaced by FP32LayerNorm"):
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
    with pytest.warns(UserWarning, match=rf"isn't fused any more: its {norm.split('.')[-1]} was replaced by LayerNorm"):
        model.set_submodule(norm, replacement)
    assert 0 < fused_calls(lambda: torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)) < tiny.MODELS[name].total
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
    ours = sum(generated.origin_of(cls) is not None for cls in classes(patch_model(model)))
    unpatch_model(model)
    patched, unpatched = (record.getMessage() for record in caplog.records)
    assert patched == "patched, rounding='eager': model (WanTransformer3DModel) 3 of 3 blocks"
    assert unpatched == f"unpatched {ours} modules of model (WanTransformer3DModel)"


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


# Pipelines


def test_every_transformer_of_a_pipeline_is_patched_compiled_ones_too(model: nn.Module) -> None:
    second = copy.deepcopy(model)
    pipe = pipeline(torch.compile(model, backend="eager"), second)
    assert patch_pipeline(pipe) is pipe
    assert is_patched(model)
    assert is_patched(second)
    assert unpatch_pipeline(pipe) is pipe
    assert not is_patched(model)
    assert not is_patched(second)


# Arguments


def test_a_model_without_supported_blocks_is_an_error_that_lists_the_families() -> None:
    assert {"HunyuanVideo", "Qwen-Image", "SD3", "Wan"} <= set(families())
    with pytest.raises(ValueError, match=f"nothing to fuse in Linear; supported families: {', '.join(families())}"):
        patch_model(nn.Linear(2, 2))


def test_wrong_kinds_of_targets_are_type_errors(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline, got WanTransformer3DModel \(use patch_model and its like\)"):
        patch_pipeline(model)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got WanPipeline \(use patch_pipeline and its like\)"):
        patch_model(pipeline(model))  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline, got 'wan' \(load it first: diffusers.DiffusionPipeline"):
        unpatch_pipeline("wan")
    with pytest.raises(TypeError, match="expected a diffusers pipeline, got None"):
        patch_pipeline(None)
    with pytest.raises(TypeError, match=r"got the class WanPipeline \(make an instance first: from_pretrained\)"):
        patch_pipeline(diffusers.WanPipeline)
    with pytest.raises(TypeError, match=r"got the class WanTransformer3DModel \(make an instance first: from_pretrained\)"):
        patch_model(diffusers.WanTransformer3DModel)  # type: ignore[type-var]
    for function in (ditnorm.report, ditnorm.verify, ditnorm.precompute_modulation, ditnorm.restore_modulation):
        with pytest.raises(TypeError, match=r"expected a diffusers pipeline or a torch.nn.Module, got None"):
            function(None)
        with pytest.raises(TypeError, match=r"pipeline or a torch.nn.Module, got the class WanPipeline \(make an instance first"):
            function(diffusers.WanPipeline)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got 'wan' \(load it first"):
        patch_model("wan")  # type: ignore[type-var]


def test_a_pipeline_without_its_transformer_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"nothing to fuse in a WanPipeline without modules \(its transformer is None\); supported"):
        patch_pipeline(pipeline(None))  # type: ignore[arg-type]


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


def test_a_copy_that_failed_halfway_does_not_hinder_unpatching(model: nn.Module) -> None:
    patch_model(model, strict=True)
    half = nn.Module.__new__(type(model.blocks[0]))  # what a failed deepcopy leaves, as long as its traceback lives
    unpatch_model(model)
    assert not is_patched(model)
    del half
