"""The benchmark of the norm sites of diffusers' RMSNorm: its contestants agree, wrong results are
found, its bytes are those of the rows.
"""

import dataclasses

import bench_sandwich
import pytest
import torch
from bench import contestants
from bench.cell import tensors
from bench.sandwich.cells import CELLS
from bench.sandwich.contestants import check, interpreted

SMALL = [dataclasses.replace(cell, rows=20, width=64) for cell in {(c.op, c.dtype): c for c in CELLS}.values()]


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_contestants_are_right_and_the_eager_law_has_the_bits_of_the_expression(cell):
    made = cell.inputs("cpu")
    judge = check(cell, made)
    calls = {contestant.name: contestant.bind(cell)(made) for contestant in interpreted()}
    for call in calls.values():
        judge(call())
    expected = tensors(calls[contestants.UNFUSED]())
    assert all(torch.equal(a, b) for a, b in zip(tensors(calls[contestants.EAGER]()), expected, strict=True))
    with pytest.raises(ValueError, match="the result is wrong"):
        judge([2 * t for t in expected])
    with pytest.raises(ValueError, match="the results are"):
        judge([t.double() for t in expected])
    rows = sum(t.nbytes for t in (*made.values(), *expected) if t.numel() == 20 * 64)
    assert cell.bytes == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys):
    assert bench_sandwich.main([]) == 2
    assert "GPU" in capsys.readouterr().err
