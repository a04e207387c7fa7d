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
import sys

from common.releases import ROOT, counts, failed, outcome_of, record, releases, run
from packaging.version import Version
from tqdm import tqdm  # type: ignore[import-untyped]

RECORD = ROOT / "docs" / "diffusers.json"
TESTS = "tests/test_every_model.py"


def environment(version: Version) -> dict[str, str]:
    """That of a Python that imports this release."""
    folder = ROOT / "build" / "diffusers" / str(version)
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        run([*pip, f"diffusers=={version}"], check=True)
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "OMP_NUM_THREADS": "1"}


def fingerprints(version: Version) -> dict[str, str]:
    """Those of the functions that ditnorm replaces."""
    listed = run([sys.executable, "tests/fingerprints.py"], check=True, env=environment(version)).stdout
    found: dict[str, str] = json.loads(listed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", type=Version, help="these releases instead of all")
    parser.add_argument("--fingerprints", action="store_true", help="no tests: renew the fingerprints of the record")
    parser.add_argument("--tests", nargs="+", default=[TESTS], metavar="PATH", help="these tests, which aren't recorded")
    chosen = parser.parse_args()
    known = json.loads(RECORD.read_text())
    failures = 0
    if not chosen.fingerprints:
        print("| diffusers | tests |\n|---|---|")
    for version in tqdm(chosen.versions or releases("diffusers"), desc="diffusers", unit="release"):
        entry = {**known.get(str(version), {"tests": ""}), "fingerprints": fingerprints(version)}
        if not chosen.fingerprints:
            outcome = outcome_of(chosen.tests, sys.executable, environment(version))
            failures += failed(outcome)
            entry["tests"] = counts(outcome) if chosen.tests == [TESTS] else entry["tests"]
            tqdm.write(f"| {version} | {outcome} |")
        record(RECORD, {str(version): entry})
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
