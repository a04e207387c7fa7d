"""What is written of the versions that were tested."""

import json
from pathlib import Path
from typing import Any

from common.releases import failed
from packaging.version import Version

from .blocks import table
from .records import measured


def written(docs: Path) -> dict[str, str]:
    """Each block's text."""
    on_cards: dict[str, dict[str, dict[str, None]]] = {}
    for m in (m for name in ("transformers", "quantised", "modulation", "training") for m in measured(docs, name)):
        for package in ("torch", "diffusers", "python"):
            on_cards.setdefault(package, {}).setdefault(m.run["environment"][package], {})[m.card] = None
    records = {package: _record(docs / f"{package}.json") for package in ("torch", "diffusers", "python")}
    # The releases of PyTorch were tested with a Python, too.
    with_python = {found["python"]: found for found in records["torch"].values()} | records["python"]
    records["python"] = dict(sorted(with_python.items(), key=lambda entry: Version(entry[0])))
    titles = {"torch": "PyTorch", "diffusers": "diffusers", "python": "Python"}
    rows = []
    for package, title in titles.items():
        measured_with = [f"{version} ({', '.join(cards)})" for version, cards in sorted(on_cards.get(package, {}).items())]
        rows.append([title, _passed(records[package]), ", ".join(measured_with)])
    return {"versions": table(["", "tested on a CPU", "measured on GPUs"], rows, 3)}


def _record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _passed(record: dict[str, Any]) -> str:
    """The releases whose tests passed, and those of which some failed."""
    outcomes = {release: [found["tests"], found.get("kernels", found["tests"])] for release, found in record.items() if found["tests"]}
    with_failures = [release for release, said in outcomes.items() if any(map(failed, said))]
    passed = [release for release in outcomes if release not in with_failures]
    return ", ".join(passed) + (f"; with failures {', '.join(with_failures)}" if with_failures else "")
