"""The report says what runs, and verification finds an op with other bits."""

import copy
import importlib.metadata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from support import tiny
from support.patched import DTYPE, WanTransformerBlock, is_patched, pipeline, run
from torch import Tensor, nn

import ditnorm
from ditnorm import functional, kernels
from ditnorm.fused.activation_sites import ActivationSite
from ditnorm.fused.qk_sites import QKSite
from ditnorm.fused.sites import Site
from ditnorm.patching import patch_model, patch_pipeline, report, unpatch_model, verification
from ditnorm.patching.verification import execution_device, stream_dtype, verify

TORCH = torch.__version__


@pytest.fixture
def model() -> nn.Module:
    return tiny.load("wan-t2v", DTYPE)


@pytest.fixture(autouse=True)
def _unverified() -> Iterator[None]:
    """Every test verifies anew."""
    verification._identical.clear()
    verification._warned_of.clear()
    yield
    verification._identical.clear()
    verification._warned_of.clear()


def rows(text: str) -> dict[str, str]:
    """Label -> text of the first transformer's rows, unwrapped."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines()[3:]:
        if not line:
            break
        label = line[:16].strip() or label
        found[label] = f"{found.get(label, '')} {line[16:].strip()}".strip()
    return found


# The report


def test_the_report_of_a_patched_pipeline(model: nn.Module) -> None:
    pipe = patch_pipeline(pipeline(model, copy.deepcopy(model)))
    run(pipe.transformer)
    assert (
        str(report(pipe))
        == f"""\
ditnorm: WanPipeline

transformer     WanTransformer3DModel (Wan)
  fused         3 of 3 blocks, 18 fused calls a forward pass
  rounding      eager
  backend       reference (PyTorch): the model is on the CPU
  verified      bit-identical: verified on CPU, torch {TORCH}
  query and key normed and rotated in one call in 6 attention modules
  activations   GELU in place: 3

transformer_2   WanTransformer3DModel (Wan)
  fused         3 of 3 blocks, 18 fused calls a forward pass
  rounding      eager
  backend       reference (PyTorch): the model is on the CPU
  verified      bit-identical: verified on CPU, torch {TORCH}
  query and key normed and rotated in one call in 6 attention modules
  activations   GELU in place: 3

calls in this process since patching            cuda   reference
  norm_scale_shift                                 0           3
  scale_residual_norm_scale_shift                  0           6
  scale_residual                                   0           3
  qk_norm_rope                                     0           6
  joint_qk_norm_rope                               0           0
  (replays of CUDA graphs aren't counted)"""
    )


def test_the_report_of_an_unpatched_model_says_what_would_be_fused(model: nn.Module) -> None:
    found = report(model)
    assert rows(str(found))["not patched"] == "would fuse 3 of 3 blocks, 18 fused calls a forward pass"
    assert rows(str(found))["query and key"] == "would be normed and rotated in one call in 6 attention modules"
    assert found.calls is None
    assert "calls in this process" not in str(found)


@pytest.mark.parametrize("name", ["wan-t2v", "qwen-image", "hunyuan-video", "hunyuan-video-token-replace", "wan-without-cross-attn-norm"])
def test_the_reported_number_of_fused_calls_is_what_runs(name: str) -> None:
    model = patch_model(tiny.load(name, DTYPE))
    run(model, name)
    found = report(model)
    assert found.transformers[0].sites == tiny.MODELS[name].total
    assert found.calls is not None
    assert found.calls.total() == tiny.MODELS[name].total


def test_refused_blocks_are_reported_with_their_reasons(model: nn.Module) -> None:
    model.blocks[0].__class__ = WanTransformerBlock
    model.blocks[1].norm1.forward = lambda x: x
    with pytest.warns(UserWarning, match="not fused"):
        patch_model(model)
    (found,) = report(model).transformers
    assert (found.fused, found.blocks) == (1, 3)
    unknown, wrapped = found.refused.items()
    assert "is not a version that ditnorm knows (fingerprint: forward " in unknown[0]
    assert unknown[1] == ["blocks.0"]
    assert wrapped == ("norm1: its forward was replaced by test_report." + model.blocks[1].norm1.forward.__qualname__, ["blocks.1"])


def test_a_block_wrapped_since_patching_is_reported(model: nn.Module) -> None:
    patch_model(model)
    model.blocks[0].forward = lambda *args, **kwargs: None
    found = rows(str(report(model)))
    assert found["fused"].startswith("3 of 3 blocks")
    assert found["changed since"].startswith("blocks.0: its forward was replaced by test_report.")


def test_long_rows_are_wrapped_at_100_columns(model: nn.Module) -> None:
    for block in model.blocks:
        block.__class__ = WanTransformerBlock
    text = str(report(model))
    assert "is not a version" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_a_norm_with_a_forward_hook_is_reported_as_unfused(model: nn.Module) -> None:
    patch_model(model)
    model.blocks[2].norm3.register_forward_hook(lambda module, args, output: None)
    (found,) = report(model).transformers
    assert found.hooked == ["blocks.2.norm3"]
    assert rows(str(report(model)))["unfused"] == "blocks.2.norm3: watched by a hook, which is shown upstream's own values"


class Processor:
    """A user's attention processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.processor(*args, **kwargs)


def test_attention_with_an_unknown_processor_is_left_alone_and_reported(model: nn.Module) -> None:
    attention = model.blocks[1].attn1
    attention.set_processor(Processor(attention.processor))
    reason = "its processor test_report.Processor is not one that ditnorm knows"
    with pytest.raises(RuntimeError, match=f"nothing was patched: model: blocks.1.attn1 not fused: {reason}"):
        patch_model(model, strict=True)
    with pytest.warns(UserWarning, match=f"blocks.1.attn1 not fused: {reason}"):
        patch_model(model)
    (found,) = report(model).transformers
    assert (found.fused, found.attentions, found.unfused_attentions) == (3, 5, {reason: ["blocks.1.attn1"]})
    assert rows(str(report(model)))["unfused"] == f"query and key of blocks.1.attn1: {reason}"
    assert type(attention).__module__.startswith("diffusers.")


def test_calls_are_counted_from_patching_on(model: nn.Module) -> None:
    other = patch_model(copy.deepcopy(model))
    run(other)
    patch_model(model)
    assert report(model).calls is not None
    assert report(model).calls.total() == 0  # type: ignore[union-attr]
    run(model)
    assert report(model).calls == {
        ("norm_scale_shift", "reference"): 3,
        ("scale_residual_norm_scale_shift", "reference"): 6,
        ("scale_residual", "reference"): 3,
        ("qk_norm_rope", "reference"): 6,
    }


def test_single_rounding_is_reported_as_not_meant_to_be_identical(model: nn.Module) -> None:
    found = rows(str(report(patch_model(model, rounding="single"))))
    assert found["rounding"] == "single"
    assert found["verified"] == "not verified: rounding 'single' is more accurate than the unfused model, not equal to it"


def test_the_reason_for_the_reference_path_on_a_gpu_is_reported(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_model(model)
    on_gpu(model)
    monkeypatch.setattr(kernels, "unavailable", "DITNORM_KERNELS=0")
    assert report(model).transformers[0].backend == "reference (PyTorch): DITNORM_KERNELS=0"


def test_looking_never_initialises_cuda(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(kernels, "unavailable", None)
    monkeypatch.setattr(kernels, "library", None)
    on_gpu(model)
    patch_model(model)
    assert str(verify(model)["model"]) == "not verified: CUDA is not in use yet"
    found = rows(str(report(model)))
    assert found["backend"] == "cuda: the kernels are loaded at the first call"
    assert found["verified"] == "not verified: CUDA is not in use yet"
    unpatch_model(model)


def test_a_target_without_supported_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to fuse in Linear"):
        report(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline or a torch.nn.Module, got int"):
        report(3)


def test_results_print_as_tables_in_a_repl(model: nn.Module) -> None:
    assert repr(report(model)) == str(report(model))
    assert repr(verify(model)) == f"model           bit-identical: verified on CPU, torch {TORCH}"


def test_the_version_is_that_of_the_distribution() -> None:
    assert ditnorm.__version__ == importlib.metadata.version("ditnorm")


# Verification


@dataclass
class Hook:
    execution_device: str


def on_gpu(model: nn.Module) -> None:
    """What offloading with accelerate leaves: weights on the CPU, computation on the GPU."""
    model._hf_hook = Hook("cuda:0")


@pytest.mark.parametrize("op", ["norm_scale_shift", "scale_residual_norm_scale_shift", "scale_residual", "qk_norm_rope"])
def test_an_op_with_other_bits_in_one_row_of_a_hundred_is_found(op: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_model(model)
    wrong = off_by_one_bit(getattr(functional, op))
    monkeypatch.setattr(functional, op, wrong)
    with pytest.warns(RuntimeWarning, match="not bit-identical here: differs on CPU") as caught:
        result = verify(model)["model"]
    assert len(caught) == 1
    assert {site.op for site in result.differing} == {op}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert rows(str(report(model)))["verified"].startswith(f"differs on CPU, torch {TORCH}: {op} (bfloat16, ")
    with pytest.raises(RuntimeError, match="not bit-identical"):
        verify(model, strict=True)


def off_by_one_bit(op: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        first: Tensor = result[0] if isinstance(result, tuple) else result
        first.view(torch.int16)[:, ::100, 0] += 1
        return result

    return wrong


def test_a_site_is_compared_once_a_process(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    verify(model)
    monkeypatch.setattr(Site, "same_bits", None)
    monkeypatch.setattr(QKSite, "same_bits", None)
    assert str(verify(patch_model(model))["model"]) == f"bit-identical: verified on CPU, torch {TORCH}"


def test_the_sites_of_wan_are_those_of_its_block(model: nn.Module) -> None:
    fp32, k2 = torch.float32, "scale_residual_norm_scale_shift"
    assert set(verify(model)["model"].sites) == {
        Site("norm_scale_shift", 24, DTYPE, "fp32_layer", 1e-6, table=fp32),
        Site(k2, 24, DTYPE, "fp32_layer", 1e-6, weight=fp32, bias=fp32, table=fp32, modulated=False),
        Site(k2, 24, DTYPE, "fp32_layer", 1e-6, table=fp32),
        Site("scale_residual", 24, DTYPE, table=fp32),
        QKSite(False, 2, 12, True, DTYPE, "rms", 1e-6, DTYPE, "per_pair"),
    }


def test_the_sites_of_hunyuan_video_include_those_of_its_adaptive_norms() -> None:
    model = tiny.load("hunyuan-video", DTYPE)
    width = model.transformer_blocks[0].norm2.normalized_shape[0]
    assert set(verify(model)["model"].sites) == {
        Site("norm_scale_shift", width, DTYPE, "layer", 1e-6),
        Site("scale_residual_norm_scale_shift", width, DTYPE, "layer", 1e-6),
        Site("scale_residual", width, DTYPE),
        ActivationSite("gelu", DTYPE),
        *(QKSite(joint, 2, 12, False, DTYPE, "diffusers_rms", 1e-6, DTYPE, "per_element") for joint in (True, False)),
    }


def test_refused_units_are_not_verified(model: nn.Module) -> None:
    for block in model.blocks:
        block.__class__ = WanTransformerBlock
    assert str(verify(model)["model"]) == "not verified: nothing can be fused"
    assert str(report(model).transformers[0].verification) == "not verified: nothing is patched"


def test_the_device_and_dtype_of_an_offloaded_model_are_those_it_computes_in(model: nn.Module, tmp_path: Path) -> None:
    assert (execution_device(model), stream_dtype(model)) == (torch.device("cpu"), DTYPE)
    grouped, cast, meta = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model).to("meta")
    apply_group_offloading(
        grouped,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_to_disk_path=str(tmp_path),
        offload_type="leaf_level",
    )
    assert execution_device(grouped) == torch.device("cpu")
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPE)
    assert stream_dtype(cast) is DTYPE
    assert str(verify(meta)["model"]) == "not verified: the weights are on no device"
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.blocks[0].attn1.to_q.weight.device.type == "meta"
    assert execution_device(model) == torch.device("cpu")
    assert str(verify(model)["model"]).startswith("bit-identical")


def test_a_model_in_another_dtype_is_not_verified(model: nn.Module) -> None:
    assert str(verify(model.double())["model"]) == "not verified: the model computes in none of float32, float16 and bfloat16"


@pytest.mark.gpu
def test_a_strict_patch_on_a_gpu_with_other_bits_changes_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model.cuda()
    monkeypatch.setattr(functional, "scale_residual", off_by_one_bit(functional.scale_residual))
    with pytest.raises(RuntimeError, match="not bit-identical here: differs on NVIDIA"):
        patch_model(model, strict=True)
    assert not is_patched(model)
    with pytest.warns(RuntimeWarning, match="not bit-identical here: differs on NVIDIA"):
        patch_model(model)
    assert is_patched(model)
