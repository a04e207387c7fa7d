"""The benchmark of the activations: its contestants agree, wrong results are found, its bytes are
those of the tensors.
"""

import dataclasses

import bench_activation
import pytest
import torch
from bench import contestants
from bench.activation.cells import CELLS
from bench.activation.contestants import check, interpreted
from bench.cell import tensors

SMALL = [
    dataclasses.replace(cell, tokens=6, width=3 * 64 if cell.beside else 64, beside=64 if cell.beside else 0)
    for cell in {(c.op, c.beside > 0, c.dtype): c for c in CELLS}.values()
]


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_contestants_are_right_and_the_eager_law_has_the_bits_of_the_expression(cell):
    made = cell.inputs("cpu")
    judge = check(cell, made)
    calls = {contestant.name: contestant.bind(cell)(made) for contestant in interpreted()}
    for call in calls.values():
        judge(call())
    expected = calls[contestants.UNFUSED]()
    assert torch.equal(calls[contestants.EAGER](), expected)
    wrong = expected.clone()
    wrong[0, -1, -1] = 1.1 * wrong[0, -1, -1] + 1
    with pytest.raises(ValueError, match="the result is wrong"):
        judge(wrong)
    with pytest.raises(ValueError, match="the result is torch"):
        judge(expected[:, :-1])
    if cell.beside:
        wrong = expected.clone()
        wrong[0, 0, 0] += 1
        with pytest.raises(ValueError, match="what stands beside it"):
            judge(wrong)


@pytest.mark.parametrize("op", ["gelu", "swiglu"])
def test_results_below_the_normal_numbers_of_float16_are_right_to_the_next_number(op):
    cell = dataclasses.replace(SMALL[0], op=op, tokens=32, width=512, beside=0, dtype="fp16")
    made = cell.inputs("cpu")
    made["x"].copy_(torch.linspace(-1e-5, 1e-5, made["x"].numel()).view_as(made["x"]))
    result = {contestant.name: contestant.bind(cell)(made) for contestant in interpreted()}[contestants.UNFUSED]()
    assert (result.abs() < torch.finfo(torch.float16).smallest_normal).any()
    check(cell, made)(result)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_bytes_are_those_of_the_tensors(cell):
    small = dataclasses.replace(cell, tokens=2)
    made = small.inputs("cpu")
    written = 2 * (cell.beside + cell.width) * made["x"].itemsize
    assert small.bytes == sum(t.numel() * t.itemsize for t in tensors(made)) + written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys):
    assert bench_activation.main([]) == 2
    assert "GPU" in capsys.readouterr().err
