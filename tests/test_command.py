"""Records say how a figure is measured again, and nothing of the machine that measured it."""

import pytest
from common.command import as_command


@pytest.mark.parametrize("out", [["--out", "/scratch/me/run 1"], ["--out=/scratch/me/run"], []])
def test_the_folder_of_results_is_left_out(out: list[str]) -> None:
    assert as_command("scripts/x.py", ["--cells", "a b", *out, "--quick"]) == "python scripts/x.py --cells 'a b' --quick"
