"""docs/models.md names every family, and counts the fused calls of its blocks."""

import re

import pytest
import torch
from results_page import DOCS
from support import tiny

from ditnorm.models import families
from ditnorm.patching.units import find_units

ROWS = dict(re.findall(r"^\| ([\w.-]+) \| .* \| (.* block.*) \|$", (DOCS / "models.md").read_text(), re.MULTILINE))


def test_every_family_is_on_the_page():
    assert sorted(ROWS) == sorted(families())


@pytest.mark.parametrize("family", families())
def test_the_page_counts_the_fused_calls_of_blocks(family):
    counted = set()
    for name in tiny.MODELS:
        units = [unit for unit in find_units(tiny.load(name, torch.bfloat16)) if unit.is_block and unit.body.family == family]
        counted |= {sum(call.quantised is None for call in unit.calls(torch.bfloat16)) for unit in units}
    said = {int(number) for number in re.findall(r"\d+(?= (?:a|in|with)\b)", ROWS[family])}
    assert said <= counted
    assert max(said) == max(counted)
