"""Precomputed modulations: the bits of the unpatched model, whatever the table was made for."""

from typing import Any

import pytest
import torch
from support import model_checks, tiny
from torch import nn

import ditnorm
from ditnorm.patching.restoring import tables

_WITHOUT = ("wan", "chronoedit", "qwen-image-2.1", "chroma", "flux2", "z-image", "lumina2", "ltx2")
NOTHING_TO_GAIN = [name for name in tiny.MODELS if name.startswith(_WITHOUT)]
MODULATED = [name for name in tiny.MODELS if name not in NOTHING_TO_GAIN]


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
    names = list(model.state_dict())
    ditnorm.precompute_modulation(model)
    tiny.run(model, arguments)
    assert list(model.state_dict()) == names
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
    with pytest.raises(ValueError, match=f"nothing to gain in {type(model).__name__}: ") as raised:
        ditnorm.precompute_modulation(model)
    assert "does not know" not in str(raised.value)
    assert not ditnorm.report(model).transformers[0].fused


def test_a_guidance_that_is_added_to_the_embedding_is_named() -> None:
    """Row numbers can't be added to."""
    model = tiny.load("bria-fibo", torch.bfloat16)
    model.guidance_embed = nn.Identity()
    with pytest.raises(RuntimeError, match="model: it adds what its guidance_embed makes to the embedding of the timestep"):
        ditnorm.precompute_modulation(model)


@pytest.mark.parametrize("name", ["bria", "bria-fibo", "ovis-image", "longcat-image"])
def test_a_schedule_is_made_at_once(name: str) -> None:
    arguments = tiny.inputs(name, 1, torch.bfloat16)
    schedule = torch.tensor([1000.0, 750.0, 500.0, 250.0]) / (1 if name.startswith("bria") else 1000)
    steps = [arguments | {"timestep": t[None].to(torch.bfloat16)} for t in schedule]
    upstream = tiny.load(name, torch.bfloat16)
    expected = [tiny.run(upstream, step) for step in steps]
    model = precomputed(name, timesteps=schedule)
    assert all(torch.equal(tiny.run(model, step), e) for step, e in zip(steps, expected, strict=True))
    table = table_of(model)
    assert (table.hits, table.schedules, table.misses) == (3, 1, 0)


def contents(model: nn.Module) -> list[Any]:
    """Where CUDA is in use, weights come back from pinned memory, to other addresses."""
    return model_checks.contents(model, addresses=not torch.cuda.is_initialized())
