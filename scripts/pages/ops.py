"""What is written of single ops: docs/kernels.md."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import tables
from bench.norm.cells import Cell
from bench.qk.cells import QKCell
from bench.results import load

from .blocks import table

OTHERS = {
    "sandwich": "The norm sites of diffusers' RMSNorm",
    "activation": "GELU and SwiGLU",
    "gradients": "Gradients",
    "quantize": "Quantising kernels",
}
"""Records with a table of all their cells, where there are any."""


def written(docs: Path) -> dict[str, str]:
    """Each block's text."""
    ops, qk = load(docs / "ops.json", Cell), load(docs / "qk.json", QKCell)
    document = json.loads((docs / "ops.json").read_text())
    others = "\n\n".join(_cells(name, title, docs / f"{name}.json") for name, title in OTHERS.items() if (docs / f"{name}.json").exists())
    return {
        "ops": f"{_where('ops', ops.environment)}\n\n" + "\n".join(tables.norm_in_kernels(ops)),
        "bars": _bars(document["bars"]),
        "host": _host(document["host_us"]),
        "qk": f"{_where('qk', qk.environment)}\n\n" + "\n".join(tables.qk_in_kernels(qk)),
        "other-ops": others or "None of them has a record yet.",
    }


def _where(script: str, environment: Mapping[str, Any]) -> str:
    peers = "".join(f", {name} {version}" for name, version in environment["peers"].items())
    commands = [
        f"`python scripts/bench_{script}.py{options}`" for options in map(_options, (environment["command"], *environment.get("again", ())))
    ]
    return (
        f"Measured {environment['date'][:10]}, {environment['gpu']}, driver {environment['driver']}, torch {environment['torch']}{peers}; "
        f"{', then some cells again by '.join(commands)}; all cells in [{script}.json]({script}.json)."
    )


def _options(command: str) -> str:
    """Of a benchmark, without where it wrote."""
    return re.sub(r"^.*?\.py| --out \S+", "", command)


def _bars(bars: list[Mapping[str, Any]]) -> str:
    rows = [[bar["bar"], f"{bar['held']} of {bar['judged']}", _worst(bar["misses"])] for bar in bars]
    return table(["bar", "held", "the furthest from it"], rows)


def _worst(misses: list[str]) -> str:
    def excess(miss: str) -> float:
        found = re.search(r"\(([+-][\d.]+)%\)$", miss)
        return float(found[1]) if found else 0.0

    return max(misses, key=excess, default="")


def _host(host: Mapping[str, float]) -> str:
    """A line for each op: microseconds of a call."""
    by_op: dict[str, dict[str, float]] = {}
    plain = []
    for name, us in host.items():
        op, separator, who = name.partition(": ")
        if separator:
            by_op.setdefault(op, {})[who] = us
        else:
            plain.append(f"`{name}` {us:.1f}")
    everyone = list(dict.fromkeys(who for row in by_op.values() for who in row))
    rows = [[f"`{op}`", *(f"{row[who]:.1f}" if who in row else "" for who in everyone)] for op, row in by_op.items()]
    return f"{table(['us of the host for a call', *everyone], rows)}\n\nFor comparison: {', '.join(plain)}."


def _cells(name: str, title: str, path: Path) -> str:
    document = json.loads(path.read_text())
    contestants = list(dict.fromkeys(who for cell in document["cells"] for who in cell["contestants"]))
    header = [f"{title}, us", "MB", "light", *contestants]
    filled = [[*row[:3], *(row[3].get(who, "") for who in contestants)] for row in _rows(document["cells"])]
    return f"{_where(name, document['environment'])}\n\n{table(header, filled)}"


def _rows(cells: list[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, dict[str, str]]]:
    for cell in cells:
        light = cell["light"]["us"]
        times = {}
        for who, entry in cell["contestants"].items():
            if "us" in entry and "message" not in entry:
                share = f" ({light / entry['us']:.0%})" if who.startswith("ditnorm") else ""
                times[who] = f"{entry['us']:.1f}{share}"
        yield f"`{cell['name']}`", f"{cell['bytes'] / 1e6:.1f}", f"{light:.1f}", times
