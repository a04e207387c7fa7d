"""The tables of README.md and docs/kernels.md are those of the committed results."""

import json
import shutil

import op_tables
import pytest
from bench import tables


def test_the_committed_tables_are_those_of_the_results(capsys):
    assert op_tables.main(["--check"]) == 0, capsys.readouterr().out


def test_other_results_make_other_tables(tmp_path):
    for name in ("ops.json", "qk.json"):
        shutil.copyfile(op_tables.ROOT / "docs" / name, tmp_path / name)
    document = json.loads((tmp_path / "qk.json").read_text())
    document["cells"][0]["contestants"]["ditnorm eager"]["us"] = 1234.5
    (tmp_path / "qk.json").write_text(json.dumps(document))
    for page, text in op_tables.written(tmp_path).items():
        assert "1234.5" in text
        assert "1234.5" not in page.read_text()


def test_a_table_is_found_by_its_header_and_first_row():
    page = "| a | b |\n|---|---|\n| x | 1 |\n\n| a | b |\n|---|---|\n| y | 1 |\n| z | 1 |\nend"
    new = ["| a | b |", "|---|---|", "| y | 2 |"]
    assert tables.replaced(page, new) == "| a | b |\n|---|---|\n| x | 1 |\n\n| a | b |\n|---|---|\n| y | 2 |\nend"
    with pytest.raises(ValueError, match="no table"):
        tables.replaced(page, ["| a | b |", "|---|---|", "| w | 2 |"])
