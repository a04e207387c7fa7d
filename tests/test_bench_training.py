"""The benchmark of training runs, at a small size, and reports what it measured."""

import json

import bench_training
import pytest
from bench.models import variants
from bench.models.catalogue import MODELS
from bench.training import steps
from bench.training.plans import MODELS as TRAINED
from bench.training.plans import PLANS
from support.real_sizes import shrunk
from support.slow import slow_but


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs ``bench_training.py`` with shrunk models: status and report."""
    monkeypatch.setattr(bench_training, "MODELS", shrunk(MODELS))
    monkeypatch.setattr(steps, "TIMED_SECONDS", 0)
    monkeypatch.setattr(steps, "TIMED_STEPS", 1)

    def run(*options):
        status = bench_training.main(["--out", str(tmp_path), *options])
        return status, json.loads((tmp_path / "training.json").read_text())

    return run


@pytest.mark.parametrize("name", slow_but(["wan2.1-1.3b"], TRAINED))
def test_quick_run_trains_in_every_way_with_the_losses_of_eager(name, bench, capsys):
    status, report = bench("--quick", "--layers", "1", "--profile", "--models", name)
    output = capsys.readouterr().out
    assert status == 0, output
    assert list(report["models"]) == [name]
    for entry in report["models"].values():
        assert list(entry["plans"]) == [plan.name for plan in PLANS]
        for columns in entry["plans"].values():
            assert list(columns) == ["eager", "patched"]
            assert columns["patched"]["losses"] == columns["eager"]["losses"]
            assert all(column["step_ms"] > 0 and 0 < column["other_share"] < 1 for column in columns.values())
        assert entry["title"] in output


def test_full_run_has_every_variant_and_draws_them(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(variants, "compile_blocks", lambda model: model.compile_repeated_blocks(fullgraph=True, backend="aot_eager"))
    status, report = bench("--models", "wan2.1-1.3b", "--layers", "1", "--plans", "LoRA")
    assert status == 0
    (entry,) = report["models"].values()
    expected = [variant.name for variant in variants.VARIANTS if variant is not variants.PRECOMPUTED]
    assert list(entry["plans"]["LoRA"]) == expected
    assert (tmp_path / "training.png").stat().st_size > 0
