"""FLUX.2 and FLUX.2 Klein, patched."""

import pytest
import torch
from support import model_checks, tiny

NAMES = ["flux2", "flux2-klein"]


@pytest.mark.parametrize("device", model_checks.DEVICES)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_patched_output_is_bit_identical(name, dtype, batch, device):
    model_checks.bit_identical(name, dtype, batch, device)


@pytest.mark.parametrize("device", model_checks.DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_single_rounding_is_no_less_accurate_than_unpatched(name, dtype, device):
    model_checks.no_less_accurate(name, dtype, device)


@pytest.mark.parametrize("name", NAMES)
def test_unpatching_restores_the_model(name):
    model_checks.restored(name, torch.bfloat16)


def test_gradients_are_those_of_the_unpatched_model():
    model_checks.same_gradients("flux2")
