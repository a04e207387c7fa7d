"""The least that must hold for every model with every release of diffusers; what
scripts/check_diffusers_versions.py runs.
"""

import warnings

import pytest
import torch
from support import model_checks, tiny

from ditnorm import patch_model, report, verify

DTYPE = torch.bfloat16


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_all_is_fused_and_verified(name: str) -> None:
    model = tiny.load(name, DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, strict=True)
        assert verify(model, strict=True)["model"].sites
    (found,) = report(model).transformers
    assert found.fused == found.blocks > 0
    assert (found.refused, found.unfused_attentions, found.unfused_activations) == ({}, {}, {})


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_patched_output_is_bit_identical(name: str) -> None:
    model_checks.bit_identical(name, DTYPE, 2, "cpu")


def test_gradients_are_those_of_the_unpatched_model() -> None:
    model_checks.same_gradients("qwen-image")
