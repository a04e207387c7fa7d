"""Runs the tests of the model families against every release of diffusers from the declared minimum
on, each in a venv of its own.

The venvs see this Python's packages but for diffusers. Prints a table; the exit status is 1 where a
release fails. A run of all releases leaves what it found, with the fingerprints of the functions
that ditnorm replaces, in docs/diffusers.json, of which tests/compatibility_table.py makes tables.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from tqdm import tqdm  # type: ignore[import-untyped]

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip has it inside
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "diffusers.json"
TESTS = [str(path) for path in sorted((ROOT / "tests").glob("test_models_*.py"))]


def supported() -> Requirement:
    """What pyproject.toml says of diffusers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == "diffusers")


def releases() -> list[Version]:
    """The supported releases that pip finds, oldest first."""
    found = _run([sys.executable, "-m", "pip", "index", "versions", "diffusers"]).stdout
    listed = re.search(r"Available versions: (.*)", found)
    if listed is None:
        raise SystemExit("pip lists no versions of diffusers")
    return sorted(v for v in map(Version, listed[1].split(", ")) if supported().specifier.contains(v))


def check(version: Version, folder: Path) -> tuple[str, dict[str, str]]:
    """The last line of pytest with this release, and the fingerprints."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "packages_of_the_caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", f"diffusers=={version}"], check=True)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # the workers take every core
    listed = _run([str(python), "tests/fingerprints.py"], env=environment).stdout
    pytest = [str(python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "--numprocesses", "auto"]
    done = _run([*pytest, *TESTS], env=environment)
    lines = (done.stdout + done.stderr).strip().splitlines()
    outcome = lines[-1] if lines else f"pytest ended with status {done.returncode} and printed nothing"
    return outcome, json.loads(listed or "{}")


def _run(command: list[str], *, check: bool = False, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=ROOT, env={**os.environ, **(env or {})})


def results(versions: list[Version]) -> Iterator[tuple[Version, str, dict[str, str]]]:
    for version in tqdm(versions, desc="diffusers", unit="release"):
        with tempfile.TemporaryDirectory() as folder:
            outcome, fingerprints = check(version, Path(folder))
        tqdm.write(f"{version}: {outcome}")
        yield version, outcome, fingerprints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", type=Version, help="these releases instead of all")
    chosen = parser.parse_args().versions
    table = list(results(chosen or releases()))
    print("| diffusers | tests |\n|---|---|")
    for version, outcome, _ in table:
        print(f"| {version} | {outcome} |")
    if not chosen:
        found = {str(version): {"tests": outcome.rpartition(" in ")[0], "fingerprints": prints} for version, outcome, prints in table}
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    return int(any("failed" in outcome or "error" in outcome or "passed" not in outcome for _, outcome, _ in table))


if __name__ == "__main__":
    sys.exit(main())
