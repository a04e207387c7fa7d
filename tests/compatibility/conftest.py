"""``--ran-on FILE``: records which cells passed on this machine's GPUs, for the page's last column.

    python -m pytest tests/compatibility -m "slow or not slow" --ran-on docs/compatibility.json

Cells that FILE has of the same GPUs stay unless they failed now. Not of CPUs: there each cell that
needs no GPU runs in `make test` or `make test-all`.
"""

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import diffusers
import pytest
import torch

from . import matrix, parallel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ran-on", type=Path, metavar="FILE", help="record the compatibility cells that passed on these GPUs")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--ran-on", None)  # known where this folder is named on the command line
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to their controller
        config.pluginmanager.register(Recorder(path))


class Recorder:
    """Which cells passed: in each (row, family), no order may have failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str], set[str]] = {}
        self.cells = {str(cell): (cell.feature.name, cell.family) for cell in matrix.cells()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            for row in self._rows(report.nodeid):
                self.outcomes.setdefault(row, set()).add(report.outcome)

    def _rows(self, nodeid: str) -> Iterator[tuple[str, str]]:
        name = nodeid.partition("[")[2].removesuffix("]")
        kind = name.removesuffix("-nccl")
        if name.endswith("-nccl"):
            yield from ((kind, family) for family in parallel.CASES.get(kind, ()))
        elif name in self.cells:
            yield self.cells[name]

    def pytest_sessionfinish(self) -> None:
        if not torch.cuda.is_available():
            return
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
        record = json.loads(self.path.read_text()) if self.path.exists() else {}
        machine = record.setdefault(name if count == 1 else f"{count} x {name}", {"rows": {}})
        machine |= {"date": date.today().isoformat(), "torch": torch.__version__, "diffusers": diffusers.__version__}
        for (row, family), outcomes in self.outcomes.items():
            passed = set(machine["rows"].get(row, ()))
            if "failed" in outcomes:
                passed.discard(family)
            elif "passed" in outcomes:
                passed.add(family)
            machine["rows"][row] = sorted(passed)
        self.path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
