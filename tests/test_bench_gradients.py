"""The benchmark of gradients: its contestants agree, its bytes are those of the tensors."""

import dataclasses

import bench_gradients
import pytest
import torch
from bench.cell import tensors
from bench.gradients.cells import CELLS
from bench.gradients.contestants import check, formula, interpreted
from bench.gradients.host import calls

SMALL = [
    dataclasses.replace(cell, rows=6, width=256) for cell in {(c.op, c.tables, c.across, c.dtype, c.diffusers): c for c in CELLS}.values()
]


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_contestants_make_the_gradients_of_the_formula(cell):
    inputs = cell.inputs("cpu")
    judge = check(cell, inputs)
    with torch.no_grad():
        for contestant in interpreted():
            judge(contestant.bind(cell)(inputs)())
    with pytest.raises(ValueError, match="the result is wrong"):
        judge([torch.zeros_like(t) for t in tensors(formula(cell, inputs))])


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_bytes_are_those_of_the_rows(cell):
    inputs = cell.inputs("cpu")
    rows = [t for t in (*inputs.values(), *tensors(formula(cell, inputs))) if t.numel() == cell.rows * cell.width and not t.is_complex()]
    assert cell.bytes == sum(t.nbytes for t in rows)


def test_calls_under_grad_make_the_gradients_of_the_unfused_expression():
    with torch.no_grad():  # as the benchmark runs
        made = {name: call() for name, call in calls("cpu").items()}
    for op in ("norm_scale_shift", "scale_residual_norm_scale_shift", "scale_residual"):
        ours, unfused = (grads for name, grads in made.items() if name.startswith(f"{op}: "))
        assert len(ours) == len(unfused) == (1 if op == "norm_scale_shift" else 2)
        assert all(a.shape == b.shape for a, b in zip(ours, unfused, strict=True))
        assert all(map(torch.equal, ours, unfused))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys):
    assert bench_gradients.main([]) == 2
    assert "GPU" in capsys.readouterr().err
