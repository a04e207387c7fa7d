"""The command around the benchmarks of ops, with everything that needs a GPU made up."""

import functools
import json
import re

import bench_activation
import bench_gradients
import bench_ops
import bench_qk
import bench_quantize
import bench_sandwich
import pytest
import torch
from bench import cell_run, command, contestants, environment, host, light, results, timing
from bench.norm.cells import Cell
from bench.qk.cells import QKCell

KINDS = {"ops": (bench_ops, Cell, "nss/128x1024/sample/bf16"), "qk": (bench_qk, QKCell, "128 tokens")}
MORE = {"ops": "nss/128x3072/sample/bf16", "qk": "1024 tokens"}


@pytest.mark.parametrize("script", [bench_ops, bench_qk, bench_activation, bench_quantize, bench_gradients, bench_sandwich])
def test_there_is_a_plain_copy_for_the_mix_of_each_cell(script):
    mixes = set(re.findall(r"launch_kind<(\d+), (\d+)>\(kind", light.SOURCE.read_text()))
    for cell in script.BENCHMARK.cells:
        reads, writes, size = cell.streams
        assert (str(reads), str(writes)) in mixes, cell.name
        assert size % 16 == 0


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def without_gpu(monkeypatch):
    """Calls run on the CPU, each in a microsecond."""

    class NoLight:
        def finalists(self, streams, sets, calls):
            return {"a copy": [lambda: None] * sets}

    for cls in (Cell, QKCell):
        monkeypatch.setattr(cls, "inputs", functools.partialmethod(cls.inputs, device="cpu"))
    monkeypatch.setattr(command, "_unusable", lambda: None)
    monkeypatch.setattr(command, "Light", NoLight)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(
        host, "measure", lambda cells, everyone, warn: {host.LAYER_NORM: 5e-6} | {f"{op}: {everyone[0].name}": 6e-6 for op in cells}
    )
    monkeypatch.setattr(cell_run, "input_sets", lambda input_bytes: 2)
    monkeypatch.setattr(cell_run, "record", lambda bound, calls: timing.Recording(None, calls, bound))
    monkeypatch.setattr(cell_run, "measure", lambda recordings: {name: timing.Timing(1e-6, 1e-6, 2e-6) for name in recordings})


def test_a_run_writes_its_file_and_says_what_it_found(kind, without_gpu, tmp_path, capsys):
    script, cell_type, name = KINDS[kind]
    assert script.main(["--no-compile", "--cells", name, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    run = results.load(tmp_path / f"{kind}.json", cell_type)
    (result,) = (r for r in run.results if r.cell.name == name)
    assert result.entries[contestants.EAGER].bits_equal
    for contestant in (contestants.SINGLE, contestants.EAGER, contestants.UNFUSED):
        assert result.us(contestant) == pytest.approx(1.0)
        assert contestant in output
    assert "Some GPU" in environment.text(run.environment)
    assert name in output
    assert f"{tmp_path / kind}.json" in output
    assert all(f"{op}: {contestants.SINGLE}" in run.host_seconds for op in script.BENCHMARK.host_cells)
    judged = json.loads((tmp_path / f"{kind}.json").read_text())["bars"]
    assert bool(judged) == (tmp_path / f"{kind}.png").exists() == (kind == "ops")


def test_an_interrupted_run_keeps_the_cells_that_it_has(kind, without_gpu, tmp_path, monkeypatch, capsys):
    script, cell_type, name = KINDS[kind]
    measured = []

    def interrupted(cell, *others):
        if measured:
            raise KeyboardInterrupt
        measured.append(cell)
        return cell_run.run_cell(cell, *others)

    monkeypatch.setattr(command, "run_cell", interrupted)
    assert script.main(["--no-compile", "--cells", name, MORE[kind], "--out", str(tmp_path)]) == 0
    assert "interrupted: 1 of " in capsys.readouterr().out
    assert [r.cell for r in results.load(tmp_path / f"{kind}.json", cell_type).results] == measured


def test_cells_that_no_pattern_names_are_an_error(kind, without_gpu, capsys):
    script, _, _ = KINDS[kind]
    assert script.main(["--cells", "no such cell"]) == 2
    assert "no cell's name contains no such cell" in capsys.readouterr().err


def test_the_host_is_measured_at_the_size_that_its_table_names(kind):
    script, _, _ = KINDS[kind]
    for cell in script.BENCHMARK.host_cells.values():
        first = next(iter(cell.inputs("cpu").values()))
        assert first.shape == (1, *host.SIZE)
