"""What the checks that all families share rely on."""

import pytest
import torch
from support import tiny
from support.model_checks import NOISE_LEVELS, independent_inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_no_two_batches_that_count_as_independent_have_a_noise_level_in_common(name: str, dtype: torch.dtype) -> None:
    batches = independent_inputs(name, dtype)
    levels = [batch[key].unique()[-1].item() for batch in batches for key in sorted(NOISE_LEVELS & batch.keys())[:1]]
    assert len(set(levels)) == len(batches)
