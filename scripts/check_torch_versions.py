"""Runs a few tests with releases of PyTorch, on the CPU: each is installed into a venv that is
thrown away, 5 GB of disk and some minutes a release.

Without arguments the newest patch of each minor release from the declared minimum on. The venvs see
this Python's other packages. Prints a table; the exit status is 1 where a release fails. What it
found stands in docs/torch.json.
"""

import argparse
import platform
import sys
import sysconfig
from pathlib import Path

from common.releases import ROOT, counts, failed, installed, outcome_of, record, releases, run, thrown_away_venv
from packaging.version import Version
from tqdm import tqdm  # type: ignore[import-untyped]

RECORD = ROOT / "docs" / "torch.json"
TESTS = [f"tests/test_{name}.py" for name in ("every_model", "ops_eager", "ops_errors", "ops_compile", "patching", "torch_private")]


def newest_patches() -> list[Version]:
    """The last of each minor release."""
    return sorted({version.release[:2]: version for version in releases("torch")}.values())


def check(version: Version, tests: list[str]) -> tuple[str, str]:
    """The full version of what pip installs for this release, and what came of the tests
    with it.
    """
    with thrown_away_venv() as python:
        if why := installed(python, f"torch=={version}"):
            return "", why
        site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True).stdout.strip()
        Path(site, "packages_of_the_caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
        env = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        full = run([python, "-c", "import torch; print(torch.__version__)"], check=True, env=env).stdout.strip()
        return full, outcome_of(tests, python, env)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", type=Version, help="these releases instead")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="these tests, which aren't recorded")
    chosen = parser.parse_args()
    failures = 0
    print("| PyTorch | build | tests |\n|---|---|---|")
    for version in tqdm(chosen.versions or newest_patches(), desc="PyTorch", unit="release"):
        build, outcome = check(version, chosen.tests)
        failures += failed(outcome)
        tqdm.write(f"| {version} | {build} | {outcome} |")
        if chosen.tests == TESTS and build:
            record(RECORD, {str(version): {"build": build, "python": platform.python_version(), "tests": counts(outcome)}})
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
