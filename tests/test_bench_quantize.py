"""The benchmark of the quantising ops: its contestants agree, its bytes are those of the
tensors.
"""

import dataclasses
from types import SimpleNamespace

import bench_quantize
import pytest
import torch
from bench.cell import tensors
from bench.quantized import peers
from bench.quantized.cells import CELLS
from bench.quantized.contestants import check, expression, interpreted
from support.peers import missing_without_packages

from ditnorm.ops.quantization import quantize

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


def test_missing_peers_are_named(monkeypatch):
    assert missing_without_packages(peers.found, monkeypatch).keys() == {"sglang", "comfy-kitchen"}


def test_peers_are_asked_where_they_serve_and_understood(monkeypatch):
    """Rows are a matrix to them. The scales of sglang's float8 are a vector."""
    laws = {cell.law: cell.quantiser for cell in SMALL}

    def rowwise(rows):
        assert rows.dim() == 2
        values, scale = quantize(rows, laws["float8-row"])
        return values, scale.flatten()

    def int8(rows):
        assert rows.dim() == 2
        return quantize(rows, laws["int8-row"])

    library = SimpleNamespace(fp8_rowwise=rowwise, per_token_quant_int8=int8, quantize_int8_rowwise=int8)
    monkeypatch.setattr(peers, "sglang_module", lambda name: library)
    monkeypatch.setattr(peers, "comfy_kitchen", lambda: library)
    served = []
    for name, bind in (("sglang", peers._sglang()), ("comfy-kitchen", peers._comfy_kitchen())):
        for cell in SMALL:
            inputs = cell.inputs("cpu")
            call = bind(cell)(inputs)
            if call is not None:
                check(cell, inputs)(call())
                served.append((name, cell.op, cell.law))
    assert set(served) == {
        ("sglang", "quantize", "float8-row"),
        ("sglang", "quantize", "int8-row"),
        ("comfy-kitchen", "quantize", "int8-row"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys):
    assert bench_quantize.main([]) == 2
    assert "GPU" in capsys.readouterr().err
