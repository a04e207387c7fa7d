"""Runs tests/test_every_model.py, in which each model is patched and compared once, with every
release of diffusers from the declared minimum on: half a minute a release.

Releases are installed into build/diffusers, without what they need, which is this Python's. Prints
a table; the exit status is 1 where a release fails. What it found, with the fingerprints of the
functions that ditnorm replaces, stands in docs/diffusers.json, of which
tests/compatibility_table.py makes tables.
"""

import argparse
import json
import os
import re
import subprocess
import sys
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
TESTS = "tests/test_every_model.py"


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


def environment(version: Version) -> dict[str, str]:
    """That of a Python that imports this release."""
    folder = ROOT / "build" / "diffusers" / str(version)
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        _run([*pip, f"diffusers=={version}"], check=True)
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "OMP_NUM_THREADS": "1"}


def fingerprints(version: Version) -> dict[str, str]:
    """Those of the functions that ditnorm replaces."""
    listed = _run([sys.executable, "tests/fingerprints.py"], check=True, env=environment(version)).stdout
    found: dict[str, str] = json.loads(listed)
    return found


def tests(version: Version, paths: list[str]) -> str:
    """The last line of pytest with this release."""
    pytest = [sys.executable, "-m", "pytest", "--quiet", "--disable-warnings", "-p", "no:cacheprovider"]
    done = _run([*pytest, *paths], env=environment(version))
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else f"pytest ended with status {done.returncode} and printed nothing"


def _run(command: list[str], *, check: bool = False, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=ROOT, env={**os.environ, **(env or {})})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", type=Version, help="these releases instead of all")
    parser.add_argument("--fingerprints", action="store_true", help="no tests: renew the fingerprints of the record")
    parser.add_argument("--tests", nargs="+", default=[TESTS], metavar="PATH", help="these tests, which aren't recorded")
    chosen = parser.parse_args()
    record = json.loads(RECORD.read_text())
    failed = False
    if not chosen.fingerprints:
        print("| diffusers | tests |\n|---|---|")
    for version in tqdm(chosen.versions or releases(), desc="diffusers", unit="release"):
        entry = {**record.get(str(version), {"tests": ""}), "fingerprints": fingerprints(version)}
        if not chosen.fingerprints:
            outcome = tests(version, chosen.tests)
            failed |= "failed" in outcome or "error" in outcome or "passed" not in outcome
            entry["tests"] = outcome.rpartition(" in ")[0] if chosen.tests == [TESTS] else entry["tests"]
            tqdm.write(f"| {version} | {outcome} |")
        record[str(version)] = entry
    RECORD.write_text(json.dumps(dict(sorted(record.items(), key=lambda item: Version(item[0]))), indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
