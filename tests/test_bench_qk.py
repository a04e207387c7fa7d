"""The benchmark of query and key: its cells, contestants and file, as far as that needs no GPU."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from bench import contestants, results
from bench.qk import peers
from bench.qk.cells import CELLS, QKCell
from bench.qk.contestants import check, expression, interpreted
from support.peers import missing_without_packages

from ditnorm.ops import reference_qk
from ditnorm.ops.table import OPS

CPU = torch.device("cpu")
DOCS = Path(__file__).parent.parent / "docs"
TINY = [
    QKCell("joint", 5, 2, 64, encoder=3),
    QKCell("dual", 5, 2, 64, encoder=3, rotary="per_element"),
    QKCell("single", 8, 2, 64, rotary="per_element", rotated=5),
    QKCell("across", 5, 2, 64, rotary="per_pair", across=True),
    QKCell("alone", 5, 2, 64),
    QKCell("unrotated", 5, 2, 64, rotary=None),
    QKCell("fp16", 5, 2, 64, dtype="fp16"),
    QKCell("fp32", 5, 2, 64, dtype="fp32"),
]
ROTATED = [cell for cell in TINY if cell.rotary is not None]


def test_missing_peers_are_named(monkeypatch):
    missing = missing_without_packages(peers.found, monkeypatch)
    assert missing.keys() == {"sglang", "sglang in place", "sglang CuTe", "sglang triton", "comfy-kitchen"}


@pytest.mark.parametrize("cell", ROTATED, ids=lambda cell: cell.name)
def test_peers_tables_rotate_as_the_op(cell):
    made = dataclasses.replace(cell, dtype="fp32").inputs("cpu")
    x = torch.randn(1, cell.tokens, cell.heads, cell.head_dim, device=CPU)
    expected = x.clone()
    tables = made["rotary"] if isinstance(made["rotary"], tuple) else (made["rotary"], None)
    rotated = reference_qk.token_count(tables[0])
    expected[:, :rotated] = reference_qk.rotate(x[:, :rotated], *tables)

    cos, sin = peers.halves(made["rotary"], cell.tokens, cell.head_dim, CPU)
    assert cos.shape == sin.shape == (cell.tokens, cell.head_dim // 2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(torch.view_as_real(pairs).flatten(3), expected)
    pairs = (peers.matrices(cos, sin) @ x.unflatten(-1, (-1, 2, 1))).flatten(3)
    torch.testing.assert_close(pairs, expected)


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.name)
def test_contestants_are_right_and_the_eager_law_has_the_bits_of_the_expression(cell):
    made = cell.inputs("cpu")
    judge = check(cell, made)
    calls = {contestant.name: contestant.bind(cell)(made) for contestant in interpreted()}
    for call in calls.values():
        judge(call())
    for ours, unfused in zip(calls[contestants.EAGER](), calls[contestants.UNFUSED](), strict=True):
        assert torch.equal(ours, unfused)


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.name)
def test_wrong_results_are_rejected(cell):
    made = cell.inputs("cpu")
    judge = check(cell, made)
    eager = expression(cell, OPS[cell.op].expression, made)()
    wrong = [t.clone() for t in eager]
    wrong[1][0, -1, -1, -2:] *= 1.1
    with pytest.raises(ValueError, match="the key is off by"):
        judge(wrong)
    wrong[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the key is off by nan"):
        judge(wrong)
    with pytest.raises(ValueError, match="1 results"):
        judge(eager[:1])


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_bytes_are_those_of_the_tensors(cell):
    """Wan's tables hold each value twice, of which a call reads one, but whole lines."""
    cell = dataclasses.replace(cell, tokens=min(cell.tokens, 16), encoder=min(cell.encoder, 8), rotated=cell.rotated and 9)
    made = cell.inputs("cpu")
    tables = [made.pop(name) for name in ("rotary", "encoder_rotary") if name in made]
    rows = sum(t.nbytes for name, t in made.items() if not name.endswith("_weight"))
    assert cell.row_bytes == rows
    parts = [part for table in tables if table is not None for part in (table if isinstance(table, tuple) else (table,))]
    assert cell.bytes == 2 * rows + sum(part.untyped_storage().nbytes() for part in parts)
    reads, writes, size = cell.streams
    assert (reads + writes) * size == 2 * rows


def test_the_committed_file_is_one_of_this_format(tmp_path):
    run = results.load(DOCS / "qk.json", QKCell)
    measured = [r.cell for r in run.results]
    assert measured == [cell for cell in CELLS if cell in measured]  # newer cells wait for a GPU
    assert all(r.entries[contestants.EAGER].bits_equal for r in run.results)
    run.save(tmp_path / "qk.json", [])
    saved, committed = (json.loads((folder / "qk.json").read_text()) for folder in (tmp_path, DOCS))
    assert saved.pop("host_us") == pytest.approx(committed.pop("host_us"))  # seconds in between
    assert saved == committed
    shown = results.overview(run.results)
    assert all(cell.name in shown for cell in measured)
    assert results.details(run.results[0], run.copy_bytes_per_second).count("\n") == len(run.results[0].entries) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys):
    import bench_qk

    assert bench_qk.main([]) == 2
    assert "bench_qk: it measures CUDA kernels, and PyTorch sees no CUDA GPU here" in capsys.readouterr().err
