"""The releases of a package that the project supports, commands that are run with one of them, and
venvs to run them in.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip has it inside
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[2]
SECONDS = re.compile(r" in [\d.]+s( \(.*\))?$")


def supported(package: str) -> Requirement:
    """What pyproject.toml says of a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == package)


def releases(package: str) -> list[Version]:
    """The supported releases that pip finds, oldest first."""
    found = run([sys.executable, "-m", "pip", "index", "versions", package]).stdout
    listed = re.search(r"Available versions: (.*)", found)
    if listed is None:
        raise SystemExit(f"pip lists no versions of {package}")
    return sorted(v for v in map(Version, listed[1].split(", ")) if supported(package).specifier.contains(v))


def run(command: list[str], *, check: bool = False, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs a command in the project's folder, and keeps what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=ROOT, env={**os.environ, **(env or {})})


@contextmanager
def thrown_away_venv(interpreter: str = sys.executable) -> Iterator[str]:
    """The interpreter of a new venv, which is deleted afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="venv-"))
    try:
        run([interpreter, "-m", "venv", str(folder)], check=True)
        yield str(folder / "bin" / "python")
    finally:
        shutil.rmtree(folder)


def installed(python: str, *wanted: str, env: dict[str, str] | None = None) -> str:
    """Empty where pip installed what is wanted, else the last line of why it did not."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = run([*pip, *wanted], env=env)
    return "" if done.returncode == 0 else f"not installed: {done.stderr.strip().splitlines()[-1]}"


def outcome_of(tests: list[str], python: str, env: dict[str, str]) -> str:
    """The line in which pytest sums up, which libraries may write after as they are unloaded."""
    pytest = [python, "-m", "pytest", "--quiet", "--disable-warnings", "-p", "no:cacheprovider"]
    done = run([*pytest, *tests], env=env)
    lines = (done.stdout + done.stderr).strip().splitlines() or ["it printed nothing"]
    summaries = [line for line in lines if SECONDS.search(line)]
    if not summaries or (done.returncode != 0 and not failed(summaries[-1])):
        return f"error: pytest ended with status {done.returncode}: {lines[-1]}"
    return summaries[-1]


def counts(outcome: str) -> str:
    """What a record has of an outcome: all but how long it took."""
    return SECONDS.sub("", outcome)


def record(path: Path, found: dict[str, Any]) -> None:
    """Writes what was found of each release into a record beside what it has of others, oldest
    release first.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    entries = sorted((known | found).items(), key=lambda entry: Version(entry[0]))
    path.write_text(json.dumps(dict(entries), indent=1) + "\n")


def failed(outcome: str) -> bool:
    """Whether an outcome tells of a failure."""
    return "failed" in outcome or "error" in outcome or "passed" not in outcome
