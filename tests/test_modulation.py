"""Precomputed modulations: the bits of the unpatched model, whatever the table was made for."""

from typing import Any

import pytest
import torch
from support import model_checks, tiny
from torch import nn

import ditnorm
from ditnorm.patching.restoring import tables

NOTHING_TO_GAIN = ["wan-t2v", "wan-ti2v", "qwen-image-2.1", "chroma", "flux2", "flux2-klein"]
_FAMILIES = ("qwen-image", "hunyuan", "sd3", "flux", "longcat")
MODULATED = [name for name in tiny.MODELS if name.startswith(_FAMILIES) and not name.startswith(tuple(NOTHING_TO_GAIN))]


def table_of(model: nn.Module) -> Any:
    (table,) = tables(model)
    return table


def precomputed(name: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> nn.Module:
    return ditnorm.precompute_modulation(tiny.load(name, dtype), **more)


@pytest.mark.parametrize("dtype", tiny.DTYPES, ids=str)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("name", MODULATED)
def test_the_output_is_that_of_the_unpatched_model(name: str, batch: int, dtype: torch.dtype) -> None:
    arguments = tiny.inputs(name, batch, dtype)
    expected = tiny.run(tiny.load(name, dtype), arguments)
    model = precomputed(name, dtype)
    assert torch.equal(tiny.run(model, arguments), expected)
    assert torch.equal(tiny.run(model, arguments), expected)
    table = table_of(model)
    assert table.hits
    assert table.row_count
    assert f"{table.row_count} rows" in " ".join(str(ditnorm.report(model)).split())


@pytest.mark.parametrize("name", MODULATED)
def test_restoring_gives_everything_back(name: str) -> None:
    arguments = tiny.inputs(name, 1, torch.bfloat16)
    model = tiny.load(name, torch.bfloat16)
    expected, before, classes = tiny.run(model, arguments), contents(model), [type(m) for m in model.modules()]
    ditnorm.precompute_modulation(model)
    tiny.run(model, arguments)
    assert model.state_dict().keys() == dict(before[1]).keys()
    ditnorm.restore_modulation(model)
    assert contents(model) == before
    assert torch.equal(tiny.run(model, arguments), expected)
    ditnorm.precompute_modulation(model)
    tiny.run(model, arguments)
    ditnorm.unpatch_model(model)
    assert contents(model) == before
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("name", NOTHING_TO_GAIN)
def test_where_there_is_nothing_to_gain_it_says_so(name: str) -> None:
    model = tiny.load(name, torch.bfloat16)
    with pytest.raises(ValueError, match=r"nothing to gain in .*Transformer.*: the modulations of"):
        ditnorm.precompute_modulation(model)
    assert not ditnorm.report(model).transformers[0].fused


def contents(model: nn.Module) -> Any:
    return model_checks._contents(model), [(name, t.data_ptr()) for name, t in model.state_dict().items()]
