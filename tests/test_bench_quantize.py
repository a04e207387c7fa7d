"""The benchmark of the quantising ops: its contestants agree, its bytes are those of the
tensors.
"""

import dataclasses

import bench_quantize
import pytest
import torch
from bench.cell import tensors
from bench.quantized.cells import CELLS
from bench.quantized.contestants import check, expression, interpreted

SMALL = [dataclasses.replace(cell, rows=6, width=64) for cell in {(c.op, c.law, c.tables, c.dtype): c for c in CELLS}.values()]


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_contestants_have_the_bits_of_the_expression(cell):
    inputs = cell.inputs("cpu")
    expected, judge = tensors(expression(cell, inputs)), check(cell, inputs)
    with torch.no_grad():
        for contestant in interpreted():
            call = contestant.bind(cell)(inputs)
            if call is not None:
                returned = call()
                judge(returned)
                assert all(torch.equal(a.float(), b.float()) for a, b in zip(tensors(returned), expected, strict=True)), contestant.name
    with pytest.raises(ValueError, match="the result is wrong"):
        judge((torch.zeros_like(expected[0]), expected[1]))


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_bytes_are_those_of_the_rows(cell):
    inputs = cell.inputs("cpu")
    rows = [t for t in (*inputs.values(), *tensors(expression(cell, inputs))) if t.numel() == cell.rows * cell.width]
    again = 0 if cell.quantiser.per_row else inputs["x"].nbytes
    assert cell.bytes == sum(t.nbytes for t in rows) + again


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys):
    assert bench_quantize.main([]) == 2
    assert "GPU" in capsys.readouterr().err
