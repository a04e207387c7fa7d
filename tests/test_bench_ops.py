"""The benchmark's table, byte counts, errors, bars, picture and messages: what needs no GPU."""

import builtins
import dataclasses
import functools
import importlib
import json
from pathlib import Path

import pytest
import torch
from bench import cell_run, contestants, host, results, timing
from bench.norm import bars, cells, peers, picture, precision
from bench.norm.contestants import interpreted

SCRIPTS = Path(__file__).parent.parent / "scripts"

TINY = {"rows": 12, "width": 64}


def tiny(cell):
    """The same kind of call at a size that a test affords."""
    return dataclasses.replace(cell, rows=12, width=64 if cell.aligned else 63, frames=min(cell.frames, 3))


@pytest.fixture
def run():
    """Every cell, made up: light runs at 4 TB/s, ditnorm just holds every bar, the peers are
    slower.
    """
    made = results.Run({"gpu": "Some GPU", "torch": "2", "driver": "1"}, 4.2e12)
    for cell in cells.all_cells():
        light = cell.bytes / 4e12 * 1e6
        ours = light / 0.96
        entries = {
            contestants.SINGLE: results.Entry(ours, ours, ours, 1e-3, 1.0),
            contestants.EAGER: results.Entry(ours, ours, ours, 3e-3, 2.0, bits_equal=True),
            contestants.UNFUSED: results.Entry(6 * light, 6 * light, 6 * light, 3e-3),
            contestants.COMPILED: results.Entry(1.8 * ours, 1.8 * ours, 1.8 * ours, 1e-3),
            "sglang": results.Entry(1.2 * ours, 1.2 * ours, 1.2 * ours, 2e-3),
        }
        made.results.append(results.CellResult(cell, light, "a kernel", entries))
    made.host_seconds = {f"{op}: {name}": 5e-6 for op in cells.MODULATIONS for name in contestants.OURS} | {host.LAYER_NORM: 6e-6}
    return made


def find(run, name):
    return next(r for r in run.results if r.cell.name == name)


def bar(run, words):
    return next(b for b in bars.judge(run) if words in b.name)


def test_the_cells_cover_what_models_and_peers_publish():
    table = cells.all_cells()
    assert len({cell.name for cell in table}) == len(table)
    kinds = {(c.op, c.rows, c.width, c.layout, c.gate_layout, c.dtype, c.modulation_dtype, c.norm, c.affine) for c in table}
    for op in (cells.NSS, cells.SRNSS):
        for rows, width in [(128, 1024), (4096, 3072), (4096, 4096), (32760, 1536), (27030, 3072), (75600, 5120)]:
            assert (op, rows, width, "sample", None, "bf16", "bf16", "layer", False) in kinds
        for rows in (128, 1024, 4096):
            for width in (1024, 3072, 4096):
                for norm in ("layer", "rms"):
                    for affine in (False, True):
                        gate = "sample" if op == cells.SRNSS else None
                        assert (op, rows, width, "token", gate, "bf16", "bf16", norm, affine) in kinds
        of_op = [c for c in table if c.op == op]
        assert {"fp16", "fp32", "bf16"} == {c.dtype for c in of_op}
        assert {"sample", "token", "frame", "index"} == {c.layout for c in of_op}
        assert {1152, 1920, 2432, 6144} <= {c.width for c in of_op}
        for wanted in ("tables", "views"):
            assert any(getattr(c, wanted) for c in of_op)
        assert any(c.width % 2 for c in of_op)
    assert any(c.op == cells.SR for c in table)
    assert {c.name for c in cells.quick_cells()} < {c.name for c in table}


def test_bytes_count_each_operand_once():
    element, row = 2, 3072 * 2
    nss = cells.Cell(cells.NSS, 128, 3072)
    assert nss.bytes == 2 * 128 * row + 2 * row
    assert cells.Cell(cells.SRNSS, 128, 3072, "token", "sample").bytes == (4 + 2) * 128 * row + row
    wide = cells.Cell(cells.NSS, 128, 3072, "token", modulation="fp32", tables=True)
    assert wide.bytes == 2 * 128 * row + 2 * 128 * row * 2 + 2 * 3072 * 4
    views = cells.Cell(cells.NSS, 128, 3072, "token", views=True)
    assert views.bytes == 4 * 128 * 3072 * element
    assert cells.Cell(cells.NSS, 128, 3072, "index").bytes == nss.bytes + 2 * row + 128 * 8


@pytest.mark.parametrize("cell", [c for c in cells.all_cells() if c.rows in (4096, 32760)], ids=lambda c: c.name)
def test_bytes_are_those_of_the_tensors(cell):
    cell = tiny(cell)
    inputs = cell.inputs("cpu")
    outputs = [t for t in precision.results(cell.op, interpreted()[2].bind(cell)(inputs)()) if t is not None]
    assert cell.bytes == sum(t.numel() * t.itemsize for t in [*inputs.values(), *outputs])


@pytest.mark.parametrize("cell", [c for c in cells.all_cells() if c.rows > 4000], ids=lambda c: c.name)
def test_the_streams_move_what_the_cell_moves(cell):
    # What is left out is a few rows of modulation, affine, tables or index: 16 rows of frames at
    # most, or 8 bytes a token.
    reads, writes, size = cell.streams
    small = (3 * max(cell.frames, 2) + 5) * cell.width * 4 + 8 * cell.rows
    assert 0 <= cell.bytes - (reads + writes) * size <= small


@pytest.mark.parametrize("cell", [c for c in cells.all_cells() if c.group == "variants" or c.rows == 4096], ids=lambda c: c.name)
def test_contestants_agree_with_float64(cell):
    cell = tiny(cell)
    inputs = cell.inputs("cpu")
    both = {}
    for contestant in interpreted():
        both[contestant.name] = precision.results(cell.op, contestant.bind(cell)(inputs)())
        found = precision.errors(cell, inputs, *both[contestant.name])
        if contestant.name == contestants.SINGLE and cell.dtype != "fp32":
            assert found.excess < 1.02
        assert found.error < (1e-6 if cell.dtype == "fp32" else 1e-2)
    for ours, unfused in zip(both[contestants.EAGER], both[contestants.UNFUSED], strict=True):
        assert (ours is None and unfused is None) or torch.equal(ours, unfused)


def test_a_wrong_result_has_a_large_error(monkeypatch):
    monkeypatch.setattr(precision, "ELEMENTS_AT_ONCE", 5 * 64)  # several chunks, the last one smaller
    cell = cells.Cell(cells.NSS, **TINY)
    inputs = cell.inputs("cpu")
    y = interpreted()[0].bind(cell)(inputs)()
    assert precision.errors(cell, inputs, y, None).error < 1e-2
    y[0, -1] = 0
    assert precision.errors(cell, inputs, y, None).error > 0.1


def test_a_run_that_holds_every_bar_misses_none(run):
    judged = bars.judge(run)
    assert len(judged) == 11
    assert [b.name for b in judged if b.misses] == []
    assert "MISSED" not in bars.summary(judged)


@pytest.mark.parametrize(
    ("cell", "contestant", "change", "words"),
    [
        ("nss/128x3072/sample/bf16", contestants.SINGLE, lambda e, light: {"us": light + 0.6}, "single: close"),
        ("nss/4096x1024/sample/bf16", contestants.SINGLE, lambda e, light: {"us": light / 0.84}, "single: close"),
        ("nss/4096x3072/sample/bf16", contestants.SINGLE, lambda e, light: {"us": light / 0.94}, "single: close"),
        ("srnss/4096x3072/sample/bf16", contestants.EAGER, lambda e, light: {"us": light / 0.89}, "eager: close"),
        ("nss/32760x1536/sample/bf16", contestants.EAGER, lambda e, light: {"us": light / 0.94}, "eager: close"),
        ("nss/128x1024/sample/bf16", contestants.EAGER, lambda e, light: {"us": e.us * 10}, "eager: against"),
        ("nss/4096x3072/sample/bf16", "sglang", lambda e, light: {"us": light}, "single: against"),
        ("nss/4096x3072/sample/bf16", contestants.EAGER, lambda e, light: {"bits_equal": False}, "bit-identical"),
        ("nss/4096x3071/sample/bf16", contestants.SINGLE, lambda e, light: {"us": light * 5}, "generic"),
        ("nss/4096x3072/sample/bf16", contestants.SINGLE, lambda e, light: {"excess": 1.03}, "error"),
        ("nss/4096x3072/sample/fp32", contestants.SINGLE, lambda e, light: {"error": 4e-3}, "error"),
        ("nss/4096x3072/sample/bf16", contestants.SINGLE, lambda e, light: {"message": "RuntimeError"}, "runs in every cell"),
    ],
)
def test_a_bar_that_is_missed_names_the_cell(run, cell, contestant, change, words):
    result = find(run, cell)
    entry = result.entries[contestant]
    for name, value in change(entry, result.light_us).items():
        setattr(entry, name, value)
    missed = bar(run, words)
    assert len(missed.misses) == 1
    assert cell in missed.misses[0]
    assert missed.held == missed.judged - 1
    assert missed.misses[0] in bars.summary(bars.judge(run))


def test_geometric_means_are_over_per_sample_cells(run):
    for result in run.results:
        if not result.cell.per_sample:
            result.entries["sglang"].us = 1e-3
    assert bars.geometric_mean(run.results, "sglang", lambda result: result.us(contestants.SINGLE))[0] == pytest.approx(1.2)
    twice = bars.geometric_mean(run.results, "sglang", lambda result: result.us("sglang") / 2)
    assert twice == (pytest.approx(2), sum(result.cell.group == "anchors" and result.cell.per_sample for result in run.results))
    assert not bar(run, "faster than sglang").misses
    for result in run.results:
        result.entries[contestants.COMPILED].us /= 1.1
    assert bar(run, "faster than torch.compile").misses


def test_host_bars(run):
    run.host_seconds[f"{cells.SRNSS}: {contestants.SINGLE}"] = 7e-6
    assert not bar(run, "host time").misses
    run.host_seconds[f"{cells.NSS}: {contestants.SINGLE}"] = 7e-6
    assert len(bar(run, "host time").misses) == 1
    assert "1.17" in host.table(run.host_seconds)


def test_a_run_survives_json(run, tmp_path):
    result = find(run, "nss/4096x3072/sample/bf16")
    result.entries["liger"] = results.Entry(message="RuntimeError: no")
    run.save(tmp_path / "ops.json", [b.as_dict() for b in bars.judge(run)])
    loaded = results.load(tmp_path / "ops.json", cells.Cell)
    assert [r.cell for r in loaded.results] == [r.cell for r in run.results]
    assert bars.summary(bars.judge(loaded)) == bars.summary(bars.judge(run))
    assert json.loads((tmp_path / "ops.json").read_text())["bars"]


def test_a_contestant_that_raises_or_is_wrong_leaves_the_others_their_times(monkeypatch):
    def broken(cell):
        def make(inputs):
            raise RuntimeError("no such width\nand more")

        return make

    def wrong(cell):
        return lambda inputs: lambda: (torch.full_like(inputs["x"], float("nan")), inputs["residual"])

    class NoLight:
        def finalists(self, streams, sets, calls):
            return {"a copy": [lambda: None] * sets}

    with_inputs = functools.partialmethod(cells.Cell.inputs, device="cpu")
    monkeypatch.setattr(cells.Cell, "inputs", with_inputs)
    monkeypatch.setattr(cell_run, "input_sets", lambda input_bytes: 3)
    monkeypatch.setattr(cell_run, "record", lambda bound, calls: timing.Recording(None, calls, bound))
    monkeypatch.setattr(cell_run, "measure", lambda recordings: {name: timing.Timing(2e-6, 1e-6, 3e-6) for name in recordings})
    everyone = [contestants.Contestant("broken", broken), contestants.Contestant("wrong", wrong), *interpreted()]
    result = cell_run.run_cell(cells.Cell(cells.SRNSS, **TINY), everyone, NoLight(), precision.check)
    assert result.entries["broken"].message == "RuntimeError: no such width"
    assert result.us("broken") is None
    assert result.entries["wrong"].message == "ValueError: the result is wrong: its error against float64 is nan"
    assert result.us("wrong") is None
    assert result.us(contestants.SINGLE) == pytest.approx(2.0)
    assert result.entries[contestants.EAGER].bits_equal
    assert (result.light_us, result.light_kernel) == (pytest.approx(2.0), "a copy")


def test_the_tables_show_failures_and_shares(run):
    result = find(run, "nss/4096x3072/sample/bf16")
    result.entries["liger"] = results.Entry(message="RuntimeError: no")
    shown = results.details(result, run.copy_bytes_per_second)
    assert "RuntimeError: no" in shown
    assert "96.0%" in shown
    assert "equal" in shown
    line = next(line for line in results.overview(run.results).splitlines() if line.startswith(result.cell.name + " "))
    assert "96%" in line
    assert "failed" in line


def test_the_picture_is_drawn(run, tmp_path):
    picture.draw(run, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_missing_peers_are_named(monkeypatch):
    plain = builtins.__import__

    def absent(name, *arguments, **options):
        if name.split(".")[0] in ("sglang", "comfy_kitchen", "liger_kernel"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr(importlib, "import_module", functools.partial(absent))
    found = peers.found.__wrapped__()
    assert found.available == []
    assert set(found.missing) == {"sglang", "sglang triton", "comfy-kitchen", "liger"}
    assert all(found.missing.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys):
    import bench_ops

    assert bench_ops.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
