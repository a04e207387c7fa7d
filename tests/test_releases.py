"""Which releases the scripts that check them take, and what they call a failure."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from subprocess import CompletedProcess

import check_python_versions
import check_torch_versions
import diffusers
import pytest
from common import releases
from packaging.version import Version


def test_the_supported_releases_are_those_of_pyproject() -> None:
    assert releases.supported("torch").specifier.contains("2.10.0")
    assert not releases.supported("torch").specifier.contains("2.9.1")


def test_each_minor_release_of_pytorch_is_checked_once_with_its_newest_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(map(Version, ("2.10.0", "2.12.0", "2.12.1", "2.13.0", "2.13.0+cpu")))
    monkeypatch.setattr(check_torch_versions, "releases", lambda package: found)
    assert list(map(str, check_torch_versions.newest_patches())) == ["2.10.0", "2.12.1", "2.13.0+cpu"]


@pytest.mark.parametrize(
    ("outcome", "failed"),
    [
        ("541 passed, 162 skipped in 110.62s", False),
        ("1 failed, 540 passed in 3.00s", True),
        ("1 error in 0.10s", True),
        ("no tests ran in 0.01s", True),
        ("not installed: ERROR: ResolutionImpossible", True),
    ],
)
def test_what_a_failure_is(outcome: str, failed: bool) -> None:
    assert releases.failed(outcome) is failed


@pytest.mark.parametrize(
    ("printed", "status", "outcome"),
    [
        ("...\n3 passed in 62.10s (0:01:02)\nnanobind: leaked 4 instances!", 0, "3 passed in 62.10s (0:01:02)"),
        ("..F\n1 failed, 2 passed in 1.00s", 1, "1 failed, 2 passed in 1.00s"),
        ("...\n3 passed in 1.00s\nSegmentation fault", -11, "error: pytest ended with status -11: Segmentation fault"),
        ("", 4, "error: pytest ended with status 4: it printed nothing"),
    ],
)
def test_the_outcome_is_what_pytest_sums_up_and_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, printed: str, status: int, outcome: str
) -> None:
    monkeypatch.setattr(releases, "run", lambda command, env: CompletedProcess(command, status, printed, ""))
    assert releases.outcome_of([], "python3", {}) == outcome
    assert releases.failed(outcome) is (status != 0)
    assert releases.counts("3 passed in 62.10s (0:01:02)") == "3 passed"


def test_a_record_keeps_what_another_run_wrote_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    releases.record(path, {"3.10.1": {"tests": "1 passed"}, "3.9.9": {}})
    releases.record(path, {"3.10.1": {"tests": "2 passed"}, "3.9.10": {}})
    assert list(json.loads(path.read_text()).items()) == [("3.9.9", {}), ("3.9.10", {}), ("3.10.1", {"tests": "2 passed"})]


@pytest.fixture
def other_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Has check_python_versions.py find all installed in this Python, and returns its record."""
    record = tmp_path / "python.json"
    monkeypatch.setattr(check_python_versions, "RECORD", record)
    monkeypatch.setattr(check_python_versions, "build_host_library", lambda: None)
    monkeypatch.setattr(check_python_versions, "thrown_away_venv", lambda interpreter: nullcontext(sys.executable))
    monkeypatch.setattr(check_python_versions, "installed", lambda *given, env: "")
    monkeypatch.setattr(sys, "argv", ["check_python_versions.py", "python3"])
    return record


@pytest.mark.parametrize("through_kernels", ["3 passed", "1 failed, 2 passed"])
def test_tests_through_the_kernels_count_as_the_others(other_python: Path, monkeypatch: pytest.MonkeyPatch, through_kernels: str) -> None:
    def outcome_of(tests: list[str], python: str, env: dict[str, str]) -> str:
        assert all((releases.ROOT / test).exists() for test in tests)
        return f"{through_kernels if 'DITNORM_LIBRARY' in env else '4 passed, 1 skipped'} in 1.0s"

    monkeypatch.setattr(check_python_versions, "outcome_of", outcome_of)
    assert check_python_versions.main() == ("failed" in through_kernels)
    (found,) = json.loads(other_python.read_text()).values()
    assert (found["tests"], found["kernels"]) == ("4 passed, 1 skipped", through_kernels)
    assert found["diffusers"] == diffusers.__version__


def test_a_python_that_cannot_have_the_packages_fails_and_is_not_recorded(other_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_python_versions, "installed", lambda *given, env: "not installed: no torch")
    assert check_python_versions.main() == 1
    assert not other_python.exists()


def test_the_host_library_is_built_where_it_is_older_than_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = []
    library = tmp_path / "cpu_sim.so"
    monkeypatch.setattr(check_python_versions, "HOST_LIBRARY", library)
    monkeypatch.setattr(check_python_versions, "run", lambda command, check: built.append(command) or CompletedProcess(command, 0))
    check_python_versions.build_host_library()
    library.touch()
    check_python_versions.build_host_library()
    os.utime(library, (0, 0))
    check_python_versions.build_host_library()
    assert len(built) == 2


def test_a_venv_is_gone_afterwards() -> None:
    with releases.thrown_away_venv() as python:
        assert releases.run([python, "-c", "print(1)"], check=True).stdout == "1\n"
    assert not Path(python).parent.exists()
