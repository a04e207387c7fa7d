"""README and docs show what the records in docs/ say, and nothing else of figures."""

import json
import re
import subprocess
from pathlib import Path

import pages.models
import pages.quantised
import pages.versions
import pytest
import results
import results_page
from bench import tables
from bench.models.catalogue import MODELS
from bench.norm.cells import Cell
from bench.results import load
from pages import blocks, records

CARD, OTHER_CARD = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
FIGURE = re.compile(r"\d[\d.,]*\s*(?:%|ms\b|us\b|GB\b|s\b|times\b)")


def entry(ms=80.0, **more):
    """What bench_transformers.py writes of a model."""
    shares = {"kernels": 5, "busy_ms": ms, "attention_ms": 1.0, "matmul_ms": 1.0}
    column = {"step_ms": ms, "first_step_s": 1.0, "peak_gb": 2.0, "shares": shares, "other_share": 0.25}
    columns = {"eager": {**column, "step_ms": 100.0}, "patched": {**column, "steps_identical": 3}}
    layers = {"num_layers": 2}
    facts = {"title": "Model 1x1", "source": "someone/model", "tokens": 1, "layers": layers, "all_layers": layers}
    return {**facts, "columns": columns, "steps_compared": 3, **more}


def run(models, device=CARD, date="2026-01-01", script="transformers"):
    environment = {"device": device, "torch": "2", "diffusers": "1"}
    return {"command": f"python scripts/bench_{script}.py", "date": date, "environment": environment, "models": models}


@pytest.fixture
def take(tmp_path):
    """Takes runs into empty records, one after the other; returns what is said and the folder."""
    docs = tmp_path / "docs"
    docs.mkdir()

    def taken(*documents):
        said = []
        for document in documents:
            (tmp_path / "measured.json").write_text(json.dumps(document))
            said += records.take(tmp_path / "measured.json", docs)
        return said, docs

    return taken


def test_the_committed_pages_are_those_of_the_records(capsys):
    assert results_page.main(["--check"]) == 0, capsys.readouterr().out


def test_every_figure_of_readme_comes_from_a_record():
    text = blocks.without((results_page.ROOT / "README.md").read_text())
    assert FIGURE.findall(text) == []


def test_pages_of_measurements_have_no_table_by_hand():
    for name in ("results.md", "training.md"):
        assert "---:|" not in blocks.without((results_page.DOCS / name).read_text())


def test_a_page_out_of_date_is_named_and_written(tmp_path, monkeypatch, capsys):
    readme = (results_page.ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme.replace("less time", "more time"))
    monkeypatch.setattr(results_page, "pages", lambda: [tmp_path / "README.md"])
    monkeypatch.setattr(results_page, "ROOT", tmp_path)
    assert results_page.main(["--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert results_page.main([]) == 0
    assert (tmp_path / "README.md").read_text() == readme


def test_blocks_are_filled_also_where_they_were_empty():
    one, two = (f"<!-- written by scripts/results_page.py: {name} -->\n" for name in ("one", "two"))
    page = f"a\n{one}<!-- end -->\nb\n{two}old\n<!-- end -->\n"
    filled = blocks.filled(page, {"one": "1", "two": "2\n"})
    assert blocks.names(page) == ["one", "two"]
    assert re.findall(r"-->\n(\d)\n<!-- end -->", filled) == ["1", "2"]
    assert blocks.without(filled) == "a\n\nb\n\n"
    assert blocks.filled(filled, {"one": "", "two": "2"}).count("<!-- end -->") == 2
    with pytest.raises(KeyError):
        blocks.filled(page, {"one": "1"})


def test_measurements_replace_those_of_the_same_model_and_device(take):
    _, docs = take(
        run({"a": entry(80.0), "b": entry(70.0)}),
        run({"a": entry(60.0)}, OTHER_CARD),
        run({"a": entry(50.0)}, date="2026-01-02"),
    )
    found = [(m.key, m.card, m.entry["columns"]["patched"]["step_ms"]) for m in records.measured(docs, "transformers")]
    assert found == [("b", "H100", 70.0), ("a", "H200", 60.0), ("a", "H100", 50.0)]
    newest = [(m.key, m.card) for m in records.newest(records.measured(docs, "transformers"))]
    assert newest == [("b", "H100"), ("a", "H100")]


def test_a_model_that_failed_leaves_the_record_as_it_was(take):
    said, docs = take(run({"a": entry()}), run({"a": {"title": "Model", "error": "out of GPU memory"}}))
    assert [m.key for m in records.measured(docs, "transformers")] == ["a"]
    assert "out of GPU memory" in "".join(said)


def test_quantised_models_and_plans_of_training_have_their_records(take):
    trained = {"title": "Model", "layers": {"num_layers": 1}, "errors": {}}
    _, docs = take(
        run({"a": entry(), "a, int8-row": entry(quantization="int8-row")}),
        run({"a": {**trained, "plans": {"LoRA": {"old": 1}, "all weights": {}}}}, script="training"),
        run({"a": {**trained, "plans": {"LoRA": {"new": 1}}}}, script="training"),
    )
    assert [m.key for m in records.measured(docs, "transformers")] == ["a"]
    assert [m.key for m in records.measured(docs, "quantised")] == ["a, int8-row"]
    plans = [m.entry["plans"] for m in records.measured(docs, "training")]
    assert plans == [{"all weights": {}}, {"LoRA": {"new": 1}}]


def test_a_run_of_ops_is_the_record_unless_it_has_fewer_cells(take):
    def ops(*cells, gpu="A"):
        return {"environment": {"command": "python /x/scripts/bench_qk.py", "gpu": gpu}, "cells": [{"name": name} for name in cells]}

    said, docs = take(ops("a", "b"), ops("c", gpu="B"), {"environment": {"command": "python demo.py"}})
    assert json.loads((docs / "qk.json").read_text()) == ops("a", "b")
    assert "left out: it has 1 cells" in said[1]
    assert "not a record" in said[2]


def test_cells_measured_later_join_the_record_of_the_same_card_only(take):
    def ops(options, gpu="A", bars=(), **cells):
        environment = {"command": f"python /x/scripts/bench_qk.py{options}", "gpu": gpu, "driver": "1", "torch": "2", "cuda": "3"}
        made = [{"name": name, "us": us, "contestants": {"ditnorm": {}}} for name, us in cells.items()]
        return {"environment": environment, "bars": list(bars), "cells": made}

    said, docs = take(ops("", a=1, b=2, c=3), ops(" --cells b d", b=4, d=5), ops(" --cells a", gpu="B", a=6))
    record = json.loads((docs / "qk.json").read_text())
    assert [cell["us"] for cell in record["cells"]] == [1, 4, 3, 5]
    assert record["environment"]["again"] == ["python /x/scripts/bench_qk.py --cells b d"]
    assert "left out: it has 1 cells" in said[2]
    whole, fewer = dict.fromkeys("abcd", 1), ops(" --cells a", a=5)
    fewer["cells"][0]["contestants"] = {}  # what was measured beside is lost
    said, docs = take(ops("", **whole), fewer, ops("", **whole, bars=["judged together"]), ops(" --cells a", a=6))
    assert "left out" in said[1]
    assert "left out" in said[3]


def test_the_first_screen_says_what_the_table_says(take):
    partly = entry(60.0, all_layers={"num_layers": 4})
    _, docs = take(run({"a": entry(80.0)}), run({"b": partly}, OTHER_CARD))
    made = pages.models.written(docs)
    assert made["headline"].startswith("**20 to 40% less time a denoising step")
    rows = [line for line in made["models"].split("\n") if line.startswith("| Model")]
    assert [row.split(" | ")[1] for row in rows] == ["H100", "H200"]
    assert "(2 of 4)" in rows[1]
    assert "equal" not in made["headline"]
    assert "equalled eager's, bit for bit" in made["models"]


def test_the_table_of_float8_has_the_compilers_wait_and_bfloat16(take):
    def quantised(law, **columns):
        made = entry(60.0, title=f"Model 1x1, {law}", quantization=law)
        made["columns"] |= {name: made["columns"]["eager"] | column for name, column in columns.items()}
        return made

    compiled = {"compiled": {"step_ms": 70.0, "first_step_s": 116.2}, "patched, bf16": {"step_ms": 90.0}}
    _, docs = take(run({"a, float8-row": quantised("float8-row", **compiled), "a, int8-row": quantised("int8-row")}, OTHER_CARD))
    (row,) = [line for line in pages.quantised.written(docs)["float8"].split("\n") if line.startswith("| Model")]
    assert row == "| Model 1x1 | H200 | 100.0 ms | 60.0 ms | **-40%** | 70.0 ms (first 116 s) | 90.0 ms |"


def test_runs_that_differ_in_their_models_only_are_one_command():
    found = ["python a.py --models x --quick", "python a.py --models y", "python a.py --models z x --quick", "python b.py"]
    lines = ["python a.py --models x z --quick", "python a.py --models y", "python b.py"]
    assert records.commands([{"command": command} for command in found]).split("\n")[1:-1] == lines


def test_every_model_and_record_is_measured_by_one_command(monkeypatch, tmp_path):
    assert set(MODELS) | set(records.OPS) | {"training", "modulation"} <= set(results.PARTS)
    commands = []
    monkeypatch.setattr(
        results.subprocess, "run", lambda command, check: commands.append(command) or subprocess.CompletedProcess(command, 0)
    )
    assert results.main(["--out", str(tmp_path)]) == 0
    assert len(commands) == len(results.PARTS)
    assert all(Path(command[1]).exists() for command in commands)
    with pytest.raises(SystemExit):
        results.main(["no such part"])


def test_latents_that_differ_are_named(take):
    different = entry(title="Other 1x1")
    different["columns"]["patched"]["steps_identical"] = 2
    _, docs = take(run({"a": entry(), "b": different}))
    assert "Latents differed in Other 1x1." in pages.models.written(docs)["models"]


def test_the_text_names_the_models_where_compiled_is_nearer_to_float32(take):
    def with_errors(title, single, compiled):
        error = {"psnr": 60.0, "chance": 0.0}
        errors = {"eager": 1.0, "patched": 1.0, "patched, single": single, "compiled": compiled}
        found = {"layers": {"num_layers": 2}, "errors": {name: {**error, "relative": value} for name, value in errors.items()}}
        return entry(title=title, accuracy=found)

    _, docs = take(run({"a": with_errors("A 1x1", 0.8, 0.9), "b": with_errors("B 1x1", 1.0, 0.9)}))
    text = pages.models.written(docs)["accuracy"]
    assert 'Compiled is nearer to float32 than `"single"` in B 1x1. In the others `"single"` is nearer.' in text


def test_each_column_has_a_legend(take):
    _, docs = take(run({"a": entry()}))
    text = pages.models.written(docs)["steps"]
    header = next(line for line in text.split("\n") if line.startswith("|  | tokens"))
    columns = [name.strip() for name in header.split("|")[4:-1]]
    assert columns == re.findall(r"^- \*(.+)\*:", text, re.MULTILINE)
    assert re.findall(r"^- ([^*].*?): ", text, re.MULTILINE) == ["eager", "patched"]


def test_a_release_whose_tests_failed_is_not_among_those_that_passed(tmp_path):
    passed, one_failed = "9 passed", "1 failed, 8 passed"
    found = {
        "3.10.1": {"tests": passed, "kernels": passed},
        "3.11.1": {"tests": one_failed, "kernels": passed},
        "3.12.1": {"tests": passed, "kernels": one_failed},
        "3.13.1": {"tests": "error: pytest ended with status -11: Segmentation fault", "kernels": passed},
        "3.14.1": {"tests": "", "kernels": ""},
    }
    (tmp_path / "python.json").write_text(json.dumps(found))
    (tmp_path / "torch.json").write_text(json.dumps({"2.10.0": {"tests": passed, "python": "3.9.1"}}))
    rows = pages.versions.written(tmp_path)["versions"]
    assert "| Python | 3.9.1, 3.10.1; with failures 3.11.1, 3.12.1, 3.13.1 |" in rows
    assert "| PyTorch | 2.10.0 |" in rows


def test_other_results_make_other_tables(tmp_path):
    document = json.loads((results_page.DOCS / "ops.json").read_text())
    cell = next(c for c in document["cells"] if c["name"] == "nss/4096x3072/sample/bf16")
    cell["contestants"]["ditnorm eager"]["us"] = 1234.5
    (tmp_path / "ops.json").write_text(json.dumps(document))
    assert "1234.5" in "\n".join(tables.norm_in_kernels(load(tmp_path / "ops.json", Cell)))
