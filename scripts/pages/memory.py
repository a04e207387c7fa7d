"""What is written of modulations from a table."""

from pathlib import Path
from typing import Any

from bench.models.catalogue import MODELS
from bench.models.variants import PATCHED, PRECOMPUTED

from .blocks import table
from .records import Measured, commands, measured, newest, runs_of, where

LISTED = 4
"""Models that README names."""


def written(docs: Path) -> dict[str, str]:
    """Each block's text."""
    schedules = measured(docs, "modulation")
    steps = [m for m in measured(docs, "transformers") if PRECOMPUTED.name in m.entry["columns"]]
    rows = [_schedule(m) for m in schedules] + [_steps(m) for m in steps]
    used = runs_of([*schedules, *steps])
    listed = "; ".join(dict.fromkeys(where(run) for run in used))
    header = ["", "GPU", "equal steps", "step ms", "peak GB", "table of 50 steps, s", "the same schedule again, s"]
    return {
        "memory": f"""Measured {listed}.

{commands(used)}

{table(header, rows, 3)}

`a → b`: patched, without and with a table. *equal steps*: so many had all bits of those without one, in each generation.
Steps run as in a pipeline, which doesn't wait for one before it prepares the next; the first column says where they were waited for.""",
    }


def in_words(docs: Path) -> str:
    """The largest savings, a model each, and what they cost in time."""
    saved: dict[str, tuple[float, float]] = {}
    times = []
    for m in (m for m in newest(measured(docs, "transformers")) if PRECOMPUTED.name in m.entry["columns"]):
        before, after = (m.entry["columns"][name] for name in (PATCHED.name, PRECOMPUTED.name))
        saved[_short(m)] = (before["peak_gb"], after["peak_gb"])
        times.append(after["step_ms"] / before["step_ms"] - 1)
    for m in newest(measured(docs, "modulation")):
        saved[_short(m)] = (m.entry["patched_peak_gb"], m.entry["precomputed_peak_gb"])
        times.append(m.entry["precomputed_ms"] / m.entry["patched_ms"] - 1)
    largest = sorted(saved.items(), key=lambda item: item[1][1] - item[1][0])[:LISTED]
    listed = [f"{name} {before:.1f} → {after:.1f} GB" for name, (before, after) in largest]
    return f"{', '.join(listed)} at the peak of a step, whose time changes by {min(times):+.0%} to {max(times):+.0%}"


def _short(m: Measured) -> str:
    title = m.entry["title"] if "title" in m.entry else MODELS[m.key].title
    return str(title).rpartition(" ")[0]


def _schedule(m: Measured) -> list[str]:
    e: Any = m.entry
    waited = ", each step waited for" if e.get("waited") else ""
    equal = ", ".join(f"{a} of {b}" for a, b in zip(e["identical"], e["steps"], strict=True))
    return [
        MODELS[m.key].title + waited,
        m.card,
        equal,
        f"{e['patched_ms']:,.1f} → {e['precomputed_ms']:,.1f}",
        f"{e['patched_peak_gb']:.2f} → {e['precomputed_peak_gb']:.2f}",
        f"{e['table_s']:.2f}",
        f"{e['again_s']:.2f}",
    ]


def _steps(m: Measured) -> list[str]:
    before, after = (m.entry["columns"][name] for name in (PATCHED.name, PRECOMPUTED.name))
    return [
        f"{m.entry['title']}, each step waited for",
        m.card,
        f"{after['steps_identical']} of {m.entry['steps_compared']}",
        f"{before['step_ms']:,.1f} → {after['step_ms']:,.1f}",
        f"{before['peak_gb']:.2f} → {after['peak_gb']:.2f}",
        f"{after['table_s']:.2f}",
        "",
    ]
