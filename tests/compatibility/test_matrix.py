"""Every cell of docs/compatibility.md."""

from pathlib import Path

import pytest

from . import matrix


@pytest.mark.parametrize("cell", matrix.parameters())
def test_the_feature_works_as_on_the_unpatched_model(cell: matrix.Cell, tmp_path: Path) -> None:
    matrix.check(cell, tmp_path)
