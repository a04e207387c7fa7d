"""docs/compatibility.md is what the data of the tests generates."""

import subprocess
import sys
from pathlib import Path


def test_the_committed_page_is_up_to_date() -> None:
    script = Path(__file__).parents[2] / "scripts" / "compatibility_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
