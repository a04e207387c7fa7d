"""scripts/bench_modulation.py with models that run on a CPU."""

import json

import bench_modulation
from bench.models.catalogue import MODELS
from support.real_sizes import shrunk


def test_it_measures_models_and_keeps_their_bits(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_modulation, "MODELS", shrunk(MODELS))
    monkeypatch.setattr(bench_modulation, "NOISE", 100.0)  # nobody times a CPU
    status = bench_modulation.main(["--steps", "6", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert status == 0, output
    for name, found in json.loads((tmp_path / "modulation.json").read_text())["models"].items():
        assert name in output
        assert found["identical"] == found["steps"] == [6, 2]
        assert found["table_s"] > 0
        assert found["again_s"] == 0
