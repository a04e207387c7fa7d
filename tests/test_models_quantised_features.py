"""What people do with quantised models, before patching and after: patched they keep the bits of
torchao's own, and stay fused.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.hooks
import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from support import quantised, tiny
from torch import Tensor, nn

from ditnorm import kernels, patch_model, report
from ditnorm.fused.quantized_linear import QuantizedLinear
from ditnorm.ops.quantization import FLOAT8_ROW, INT8_ROW, Law

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPE = torch.bfloat16


def model_of(name: str, law: Law) -> Any:
    return quantised.quantise(tiny.load(name, DTYPE), law, lambda path: "blocks." in path and "refiner" not in path)


def run(model: nn.Module, name: str) -> Tensor:
    return tiny.run(model, tiny.inputs(name, 2, DTYPE))


def quantised_calls(model: nn.Module, name: str) -> int:
    before = kernels.counts()
    run(model, name)
    return sum(n - before[key] for key, n in kernels.counts().items() if key[0].endswith("quantize"))


def offload_groups(kind: str) -> Callable[[nn.Module], object]:
    def apply(model: nn.Module) -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks)

    return apply


def cast_layerwise(model: Any) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, DTYPE)


FEATURES: dict[str, Callable[[Any], object]] = {
    "group offloading, blocks": offload_groups("block_level"),
    "group offloading, leaves": offload_groups("leaf_level"),
    "layerwise casting": cast_layerwise,
    "fused projections": lambda model: model.fuse_qkv_projections(),
    "training mode": lambda model: model.train(),
    "frozen": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("law", [FLOAT8_ROW, INT8_ROW], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["wan-t2v", "qwen-image"])
def test_features(name: str, feature: str, law: Law) -> None:
    plain = model_of(name, law)
    after, before = patch_model(copy.deepcopy(plain)), copy.deepcopy(plain)
    try:
        FEATURES[feature](plain)
        expected = run(plain, name)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"upstream fails: {error}")
    FEATURES[feature](after)
    FEATURES[feature](before)
    patch_model(before)
    for model in (after, before):
        assert torch.equal(run(model, name), expected)
        assert quantised_calls(model, name) > 0
        assert any(isinstance(m, QuantizedLinear) for m in model.modules())
        assert f"quantised     {law}" in str(report(model))


def test_a_cache_of_blocks() -> None:
    name = "qwen-image"
    plain = model_of(name, FLOAT8_ROW)
    patched = patch_model(copy.deepcopy(plain))

    def steps(model: Any) -> list[Tensor]:
        model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
        with model.cache_context("cond"):
            return [run(model, name) for _ in range(3)]

    expected = steps(plain)
    assert all(torch.equal(a, b) for a, b in zip(steps(patched), expected, strict=True))
    with patched.cache_context("cond"):
        assert quantised_calls(patched, name) > 0


@pytest.mark.parametrize("kept", [[], ["to_out", "img_mlp"], ["to_k"]], ids=str)
def test_from_pretrained_with_layers_that_are_not_converted(kept: list[str], tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    name = "qwen-image"
    model: Any = tiny.load(name, DTYPE)
    model.save_pretrained(tmp_path)
    config = diffusers.TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=DTYPE, quantization_config=config).eval()
    expected = run(loaded, name)
    patch_model(loaded)
    assert torch.equal(run(loaded, name), expected)
    in_blocks = {path: m for path, m in loaded.named_modules() if isinstance(m, nn.Linear) and "blocks." in path}
    fused = {path for path, m in in_blocks.items() if isinstance(m, QuantizedLinear)}
    assert fused == {path for path, m in in_blocks.items() if type(m.weight).__module__.startswith("torchao")}
    assert fused
    assert not any(part in path.split(".") for path in fused for part in kept)
    assert f"quantised     {INT8_ROW}: {len(fused)} linear layers" in str(report(loaded))


def test_a_patched_model_is_saved_and_loaded(tmp_path: Path) -> None:
    """A loaded one knows nothing of the patch."""
    torchao = pytest.importorskip("torchao.quantization")
    name = "qwen-image"
    model: Any = tiny.load(name, DTYPE)
    model.save_pretrained(tmp_path / "plain")
    config = diffusers.TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig())
    loaded = patch_model(type(model).from_pretrained(tmp_path / "plain", torch_dtype=DTYPE, quantization_config=config).eval())
    expected = run(loaded, name)
    loaded.save_pretrained(tmp_path / "patched", safe_serialization=False)
    again = type(model).from_pretrained(tmp_path / "patched", torch_dtype=DTYPE, use_safetensors=False).eval()
    assert torch.equal(run(again, name), expected)
    assert torch.equal(run(patch_model(again), name), expected)
    assert any(isinstance(m, QuantizedLinear) for m in again.modules())


def test_hooks_that_are_gone_leave_nothing_behind() -> None:
    """Both libraries leave the bound forward in the instance. An activation is quantised once for
    all that read it again.
    """
    name = "wan-t2v"
    model: Any = patch_model(model_of(name, INT8_ROW))
    expected, before = run(model, name), quantised_calls(model, name)

    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model, name), expected)
    assert quantised_calls(model, name) > before  # each layer for itself
    accelerate.hooks.remove_hook_from_submodules(model)
    assert "forward" in model.blocks[0].attn1.to_q.__dict__
    assert quantised_calls(model, name) == before

    for block in model.blocks:
        for module in (block.attn1, block.ffn):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "passive")
    assert torch.equal(run(model, name), expected)
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("passive", recurse=True)
    assert "forward" in model.blocks[0].attn1.__dict__
    assert quantised_calls(model, name) == before
    assert torch.equal(run(model, name), expected)
