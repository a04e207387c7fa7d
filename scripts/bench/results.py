"""What a run found out, as it is written to JSON and printed."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic

from common.tables import text_table

from .cell import C
from .contestants import AUTOTUNED, COMPILED, EAGER, OURS, SINGLE, UNFUSED


@dataclass
class Entry:
    """One contestant in one cell; times in microseconds."""

    us: float = math.nan
    low: float = math.nan
    high: float = math.nan
    error: float | None = None
    """Relative L2 error against float64: of y, of r for scale_residual. Of query and key none is
    measured.
    """
    excess: float | None = None
    """The error given the stored r, over that of rounding the exact value once."""
    bits_equal: bool | None = None
    """ditnorm eager only: whether all results equal those of the unfused expression."""
    message: str | None = None
    """What it raised, if it did."""


@dataclass
class CellResult(Generic[C]):
    """One cell: the speed of light and every contestant that serves it."""

    cell: C
    light_us: float
    light_kernel: str | None
    """None where it wasn't recorded."""
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def megabytes(self) -> float:
        return self.cell.bytes / 1e6

    def us(self, name: str) -> float | None:
        entry = self.entries.get(name)
        return None if entry is None or entry.message is not None else entry.us

    def fastest_peer(self) -> tuple[str, float] | None:
        """The fastest contestant that is neither ours nor plain eager PyTorch."""
        times = [(us, name) for name in self.entries if name not in (*OURS, UNFUSED) and (us := self.us(name)) is not None]
        return (min(times)[1], min(times)[0]) if times else None


@dataclass
class Run(Generic[C]):
    """Everything of one run."""

    environment: dict[str, Any]
    copy_bytes_per_second: float
    results: list[CellResult[C]] = field(default_factory=list)
    host_seconds: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path, bars: Sequence[Mapping[str, Any]]) -> None:
        """Writes JSON: what was measured, and the bars as judged."""
        cells = [
            {
                **asdict(r.cell),  # type: ignore[call-overload]  # a protocol can't say that it is a dataclass
                "name": r.cell.name,
                "bytes": r.cell.bytes,
                "light": {"us": r.light_us} | ({} if r.light_kernel is None else {"kernel": r.light_kernel}),
                "contestants": {name: {k: v for k, v in asdict(e).items() if v is not None and v == v} for name, e in r.entries.items()},
            }
            for r in self.results
        ]
        document = {
            "environment": self.environment,
            "copy_bytes_per_second": self.copy_bytes_per_second,
            "bars": list(bars),
            "host_us": {name: seconds * 1e6 for name, seconds in self.host_seconds.items()},
            "cells": cells,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path, cell: type[C]) -> Run[C]:
    """Reads what ``save`` wrote of cells of this type."""
    document = json.loads(path.read_text())
    names = {field.name for field in fields(cell)}  # type: ignore[arg-type]
    results = [
        CellResult(
            cell(**{name: value for name, value in c.items() if name in names}),
            c["light"]["us"],
            c["light"].get("kernel"),
            {name: Entry(**entry) for name, entry in c["contestants"].items()},
        )
        for c in document["cells"]
    ]
    host = {name: us * 1e-6 for name, us in document["host_us"].items()}
    return Run(document["environment"], document["copy_bytes_per_second"], results, host)


def details(result: CellResult[Any], copy_bytes_per_second: float) -> str:
    """The table of one cell: a line for each contestant."""
    size = result.cell.bytes
    fastest = result.fastest_peer()
    lines = [
        f"{result.cell.name}   {result.megabytes:.1f} MB   light {result.light_us:.2f} us ({result.light_kernel or 'kernel not recorded'})",
        f"  {'':<16}{'us':>9} {'quartiles':>17}{'GB/s':>7}{'of copy':>9}{'of light':>9}{'/ peer':>8}{'error':>10}{'/ once':>8}  bits",
    ]
    for name, entry in result.entries.items():
        if entry.message is not None:
            lines.append(f"  {name:<16}{entry.message}")
            continue
        rate = size / (entry.us * 1e-6)
        bits = {None: "", True: "equal", False: "DIFFER"}[entry.bits_equal]
        peer = f"{entry.us / fastest[1]:.2f}" if fastest else "-"
        lines.append(
            f"  {name:<16}{entry.us:9.2f} {f'{entry.low:.2f}-{entry.high:.2f}':>17}{rate / 1e9:7.0f}{rate / copy_bytes_per_second:9.1%}"
            f"{result.light_us / entry.us:9.1%}{peer:>8}{_small(entry.error):>10}{_ratio(entry.excess):>8}  {bits}"
        )
    return "\n".join(lines)


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def overview(results: Sequence[CellResult[Any]]) -> str:
    """A line for each cell: microseconds, and how much of the speed of light ditnorm reaches."""
    names = [SINGLE, EAGER, UNFUSED, COMPILED, AUTOTUNED]
    names += dict.fromkeys(name for r in results for name in r.entries if name not in names)
    rows = [["us of a call", "MB", "light", *names]]
    for r in results:
        shown = []
        for name in names:
            us = r.us(name)
            share = f" {r.light_us / us:4.0%}" if us is not None and name in OURS else ""
            shown.append("failed" if name in r.entries and us is None else "-" if us is None else f"{us:.2f}{share}")
        rows.append([r.cell.name, f"{r.megabytes:.1f}", f"{r.light_us:.2f}", *shown])
    return text_table(rows)
