"""Every feature of the compatibility matrix beside precomputed modulations, in both orders, and the exact way back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility import matrix
from compatibility.feature import Feature
from torch import Tensor

import ditnorm

FAMILIES = ("Qwen-Image", "HunyuanVideo")
GROUP_OFFLOADED = "group offloading moves the weights in its own order"
REFUSED = {
    "group offloading, block level, disk": GROUP_OFFLOADED,
    "group offloading, leaf level, disk": GROUP_OFFLOADED,
    "`enable_group_offload`, leaf level, disk": GROUP_OFFLOADED,
    "norms replaced by a module of the user's": "can't be fused",
    "the `forward` of a block replaced on the instance": "can't be fused",
    "a module wrapped around every block (xDiT)": "is a Wrapper, which ditnorm doesn't know",
}
"""Feature -> why precomputing is refused where the feature is there before. Where it comes after, the table is given up."""


def cells() -> Iterator[Any]:
    for features in matrix.GROUPS.values():
        for feature in features:
            for family in FAMILIES:
                cell = matrix.Cell("", feature, family, "patch before")
                if family in feature.families and matrix.upstream_failure(cell) is None:
                    yield pytest.param(feature, family, id=str(cell).removesuffix("-patch before"), marks=list(matrix._marks(cell)))


def same(feature: Feature, family: str, output: Tensor, expected: Tensor) -> None:
    if feature.bound is None:
        assert torch.equal(output, expected)
    else:
        feature.bound(output, expected, family)


@pytest.mark.parametrize(("feature", "family"), cells())
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


@pytest.mark.parametrize(("feature", "family"), cells())
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
