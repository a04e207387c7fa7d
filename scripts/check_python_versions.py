"""Runs tests with other releases of Python, on the CPU: those that are named by their interpreters.

    python scripts/check_python_versions.py python3.10 /opt/python3.14/bin/python3

Into a venv that is thrown away comes what an install with ``[test]`` brings, 6 GB of disk. The
tests of the ops run through the kernels, which are built for the host into build/. Prints a
table; the exit status is 1 where a release fails. What it found stands in docs/python.json.
"""

import argparse
import json
import sys

from common.releases import ROOT, counts, failed, installed, outcome_of, record, run, thrown_away_venv
from tqdm import tqdm  # type: ignore[import-untyped]

RECORD = ROOT / "docs" / "python.json"
HOST_LIBRARY = ROOT / "build" / "cpu_sim.so"
# What depends on how Python compiles, names, pickles and documents things.
NAMES = ("docstrings", "every_model", "fingerprint", "generated", "main", "patching", "patching_hooks", "readme", "report", "torch_private")
TESTS = [f"tests/test_{name}.py" for name in NAMES]
OP_TESTS = [f"tests/test_{name}.py" for name in ("golden", "layers", "ops_compile", "ops_eager", "ops_errors", "quantization")]
VERSIONS = (
    "import diffusers, json, platform, torch; print(json.dumps([platform.python_version(), torch.__version__, diffusers.__version__]))"
)


def build_host_library() -> None:
    """Builds it where it is missing or older than what it is built from."""
    sources = [ROOT / "scripts" / "build_kernels.py", *(ROOT / "ditnorm" / "kernels" / "csrc").iterdir()]
    if not HOST_LIBRARY.exists() or HOST_LIBRARY.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        run([sys.executable, "scripts/build_kernels.py", "--cpu-sim", "--out", str(HOST_LIBRARY)], check=True)


def check(interpreter: str) -> tuple[str, dict[str, str]]:
    """The version of Python, what it ran with and what came of it."""
    with thrown_away_venv(interpreter) as python:
        env = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if why := installed(python, f"{ROOT}[test]", env={"DITNORM_CUDA": "0"}):
            return interpreter, {"torch": "", "diffusers": "", "tests": why, "kernels": ""}
        version, torch, diffusers = json.loads(run([python, "-c", VERSIONS], check=True, env=env).stdout)
        kernels = outcome_of(OP_TESTS, python, env | {"DITNORM_LIBRARY": str(HOST_LIBRARY)})
        return version, {"torch": torch, "diffusers": diffusers, "tests": outcome_of(TESTS, python, env), "kernels": kernels}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreters", nargs="+", metavar="PYTHON")
    chosen = parser.parse_args()
    build_host_library()
    failures = 0
    print("| Python | PyTorch | diffusers | tests | through the kernels |\n|---|---|---|---|---|")
    for interpreter in tqdm(chosen.interpreters, desc="Python", unit="release"):
        version, found = check(interpreter)
        failures += failed(found["tests"]) or failed(found["kernels"])
        tqdm.write(f"| {version} | {' | '.join(found.values())} |")
        if found["torch"]:
            record(RECORD, {version: {name: counts(text) for name, text in found.items()}})
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
