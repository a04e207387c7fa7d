"""Which releases the scripts that check them take, and what they call a failure."""

import check_torch_versions
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
