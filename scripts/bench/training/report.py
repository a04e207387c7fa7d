"""What ``bench_training.py`` found, as tables and as a chart. An entry is one model's part of its
JSON.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.tables import text_table

from ..models.chart import draw
from ..models.variants import EAGER

NOTES = """step ms: median wall time of one training step (forward, backward, AdamW); host ms: until Python had come to its end;
GPU ms: sum over its kernels.
other ms: outside matmul and attention; first step: with the compiler's work; loss: of the second step."""
COSTS = 14  # kernels that --profile lists


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text."""
    header = ["model", "layers", "trained", "", "step ms", "speed", "host ms", "GPU ms", "other ms", "kernels"]
    rows = [[*header, "peak GB", "memory", "first step s", "loss"]]
    for entry, plan, columns in _measured(entries.values()):
        eager = columns[EAGER.name]
        for index, (name, column) in enumerate(columns.items()):
            shares = column["shares"]
            rows.append(
                [
                    entry["title"] if index == 0 else "",
                    layer_counts(entry) if index == 0 else "",
                    plan if index == 0 else "",
                    name,
                    f"{column['step_ms']:.1f}",
                    f"{eager['step_ms'] / column['step_ms']:.2f}",
                    f"{column['host_ms']:.1f}",
                    f"{shares['busy_ms']:.1f}",
                    f"{shares['busy_ms'] * column['other_share']:.1f}",
                    str(shares["kernels"]),
                    "" if column["peak_gb"] is None else f"{column['peak_gb']:.2f}",
                    "" if column["peak_gb"] is None else f"{column['peak_gb'] / eager['peak_gb'] - 1:+.1%}",
                    f"{column['first_step_s']:.1f}",
                    f"{column['losses'][-1]:.5f}",
                ]
            )
    errors = [f"{entry['title']}, {plan}: {text}" for entry in entries.values() for plan, text in entry["errors"].items()]
    return "\n".join([text_table(rows), *errors])


def profiles(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Of each plan the dearest kernels outside matmul and attention, by variant."""
    for entry, plan, columns in _measured(entries.values()):
        rows = [[f"{entry['title']}, {plan}", "", "launches", "ms"]]
        for name, column in columns.items():
            dearest = sorted(column["costs"].items(), key=lambda cost: -cost[1][1])[:COSTS]
            rows += [[name if i == 0 else "", kernel, str(n), f"{ms:.2f}"] for i, (kernel, (n, ms)) in enumerate(dearest)]
        yield text_table(rows)


def layer_counts(entry: Mapping[str, Any]) -> str:
    """How many of each kind."""
    return " + ".join(map(str, entry["layers"].values()))


def chart(entries: Iterable[Mapping[str, Any]], path: Path, device: str) -> None:
    """Bars: time of a step of each model and plan in each column, eager = 100 %."""
    groups = {f"{entry['title']}\n{layer_counts(entry)} layers\n{plan}": columns for entry, plan, columns in _measured(entries)}
    draw(groups, path, "one training step", device)


def _measured(entries: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    for entry in entries:
        for plan, columns in entry["plans"].items():
            yield entry, plan, columns
