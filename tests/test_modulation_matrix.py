"""Every feature of the compatibility matrix beside precomputed modulations, in both orders, and the
exact way back.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility import matrix
from compatibility.feature import Feature
from torch import Tensor

import ditnorm

FAMILIES = ("Qwen-Image", "FLUX.1", "HunyuanVideo", "SD3")
ORDERS = ("table first", "feature first")
QUICK = (
    '`compile_repeated_blocks(fullgraph=True)`, `backend="aot_eager"`',
    "accelerate `cpu_offload` (sequential)",
    "accelerate `cpu_offload_with_hook` (model)",
    "both kinds of hooks on every block",
    "diffusers `ModelHook` on every block",
    "group offloading, block level, disk",
    "layerwise casting, fp8 storage",
    "`MagCacheConfig`",
    "`FirstBlockCacheConfig`",
    "`PyramidAttentionBroadcastConfig`",
    "`SeaCacheConfig`",
    "`LayerSkipConfig`, whole block (`SkipLayerGuidance`)",
    "`SmoothedEnergyGuidanceConfig`, blurred queries",
    "`set_attn_processor`",
    '`set_attention_backend("_native_math")`',
    "embeddings of an image",
    "`add_adapter`",
    "two adapters with weights",
    "disable, enable, delete an adapter",
    "hot-swap an adapter",
    "`fuse_lora`, `unfuse_lora`",
    "`modules_to_save`: `proj_out`",
    "a forward hook on every block",
    "a forward hook on norms that changes their output",
    "norms replaced by a module of the user's",
    "layers that return fp32 into a bf16 stream",
    "`TorchAoConfig`, int8 weights",
    "`TorchAoConfig`, fp8 weights",
    "optimum-quanto fp8 weights, by hand",
    "GGUF layers, by hand",
    "`torch.inference_mode`",
    "autocast to bf16 around a bf16 model",
    "threads that generate at once",
    "`copy.deepcopy`",
    "`pickle`",
    "`state_dict`, `load_state_dict`",
    "`.half()`",
    "gradients of all parameters",
    "gradient checkpointing",
    "`load_lora_weights`, `unload_lora_weights`",
    "another scheduler",
    "`ClassifierFreeGuidance` in a modular pipeline",
    "cache-dit's `enable_cache`",
    "a module wrapped around every block (xDiT)",
)
"""Features that `make test` runs here: each kind at least once, in turn in each order and
family.
"""
GROUP_OFFLOADED = "group offloading moves the weights in its own order"
REFUSED = {
    "group offloading, block level, disk": GROUP_OFFLOADED,
    "group offloading, leaf level, disk": GROUP_OFFLOADED,
    "`enable_group_offload`, leaf level, disk": GROUP_OFFLOADED,
    "norms replaced by a module of the user's": "can't be fused",
    "the `forward` of a block replaced on the instance": "can't be fused",
    "a module wrapped around every block (xDiT)": "is a Wrapper, which ditnorm doesn't know",
}
"""Feature -> why precomputing is refused where the feature is there before. Where it comes after,
the table is given up.
"""


def cells(order: str) -> list[Any]:
    """The cells of one order. Slow are all but one family and one order of each feature of
    ``QUICK``.
    """
    found = []
    for feature in (
        feature for group, features in matrix.GROUPS.items() if group != "Quantised weights with other features" for feature in features
    ):
        possible = [matrix.Cell("", feature, f, "patch before") for f in FAMILIES if f in feature.families]
        possible = [cell for cell in possible if matrix.upstream_failure(cell) is None]
        number = QUICK.index(feature.name) if feature.name in QUICK else None
        for cell in possible:
            marks = [mark for mark in matrix._marks(cell) if mark.name != "slow"]  # which of the orders and families is chosen here
            if number is None or order != ORDERS[number % 2] or cell is not possible[number // 2 % len(possible)]:
                marks.append(pytest.mark.slow)
            found.append(pytest.param(feature, cell.family, id=str(cell).removesuffix("-patch before"), marks=marks))
    return found


def same(feature: Feature, family: str, output: Tensor, expected: Tensor) -> None:
    if feature.bound is None:
        assert torch.equal(output, expected)
    else:
        feature.bound(output, expected, family)


@pytest.mark.parametrize(("feature", "family"), cells("table first"))
def test_the_table_is_there_before_the_feature(feature: Feature, family: str, tmp_path: Path) -> None:
    reference = matrix._reference(feature, family)
    target = ditnorm.precompute_modulation(feature.load(family))
    same(feature, family, feature.run(target, family), reference.plain)
    target = feature.apply(target, tmp_path)
    for _ in range(2):
        same(feature, family, (feature.run_with or feature.run)(target, family), reference.output)
    if feature.undo is not None:
        target = feature.undo(target)
        same(feature, family, feature.run(target, family), reference.plain)
    ditnorm.restore_modulation(target)
    if feature.undo is not None:
        same(feature, family, feature.run(target, family), reference.plain)
    else:
        same(feature, family, (feature.run_with or feature.run)(target, family), reference.output)


@pytest.mark.parametrize(("feature", "family"), cells("feature first"))
def test_the_feature_is_there_before_the_table(feature: Feature, family: str, tmp_path: Path) -> None:
    reference = matrix._reference(feature, family)
    target = feature.apply(feature.load(family), tmp_path)
    if feature.name in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[feature.name]):
            ditnorm.precompute_modulation(target)
        return
    ditnorm.precompute_modulation(target)
    for _ in range(2):
        same(feature, family, (feature.run_with or feature.run)(target, family), reference.output)
    ditnorm.restore_modulation(target)
    same(feature, family, (feature.run_with or feature.run)(target, family), reference.output)
    ditnorm.precompute_modulation(target)
    same(feature, family, (feature.run_with or feature.run)(target, family), reference.output)


def test_what_is_quick_is_a_feature() -> None:
    assert set(QUICK) <= {feature.name for features in matrix.GROUPS.values() for feature in features}
