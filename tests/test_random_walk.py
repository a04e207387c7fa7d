"""A random walk over what people do to models: two of a kind, one never patched, are equal after
every step. A failure prints the walk so far; the same seed walks it again.
"""

import random
import warnings
from typing import Any

import pytest
import torch
from compatibility.walk import STEP_KINDS, Refused, Walker, same
from support import tiny
from torch import Tensor, nn

import ditnorm

FAMILIES = ["qwen-image-edit-zero-cond-t", "wan-t2v", "flux", "flux2", "z-image-small", "ltx2", "sd3.5-medium", "hunyuan-video"]
STEPS = 40
SEEDS = {name: 3 if name in FAMILIES[:2] else 1 for name in FAMILIES}
"""How many walks of each the default run takes."""


@pytest.mark.parametrize(
    ("name", "seed"),
    [pytest.param(name, seed, marks=[pytest.mark.slow] if seed >= taken else []) for name, taken in SEEDS.items() for seed in range(60)],
)
def test_a_patched_model_stays_equal_to_an_unpatched_one(name: str, seed: int) -> None:
    walk = Walker(name, random.Random(f"{name} {seed}"), tiny.load(name, torch.float32), tiny.load(name, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            step = walk.dice.choice(STEP_KINDS)
            try:
                done = step(walk)
            except Refused as refused:
                done = f"{step.__name__}, which upstream refuses too: {refused}"
            if done is not None:
                walk.trail.append(done)
                compare(walk)


def compare(walk: Walker) -> None:
    """The outputs have the same bits, or both models refuse in the same way; and the report can be
    made.
    """
    arguments = tiny.inputs(walk.name, walk.dice.choice(tiny.BATCHES), walk.dtype, seed=walk.dice.randrange(1000))
    expected, got = (outcome(walk, model, arguments) for model in walk.models())
    if not agree(got, expected):
        walk.fail(f"upstream: {described(expected)}\nours: {described(got)}\n")
    ditnorm.report(walk.ours)


def outcome(walk: Walker, model: nn.Module, arguments: dict[str, Any]) -> Tensor | Exception:
    try:
        return walk.run(model, arguments)
    except Exception as error:
        return error


def agree(got: Tensor | Exception, expected: Tensor | Exception) -> bool:
    if isinstance(got, Exception) or isinstance(expected, Exception):
        # What PyTorch refuses with a RuntimeError (weights left on the meta device), an op of ours
        # refuses by the argument's name.
        named = isinstance(expected, RuntimeError) and isinstance(got, (ValueError, TypeError))
        return named or type(got) is type(expected)
    return same(got, expected)


def described(outcome: Tensor | Exception) -> str:
    if isinstance(outcome, Exception):
        return repr(outcome)
    return f"{outcome.dtype} {list(outcome.shape)}, mean {outcome.double().mean():.9g}"
