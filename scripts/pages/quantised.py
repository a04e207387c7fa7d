"""What is written of models with quantised weights."""

from pathlib import Path

from bench.models.quantization import OTHER, OVER_BF16, SPEED, gains
from bench.models.variants import BF16, EAGER, PATCHED

from .blocks import table
from .models import COMPILED, charts, equal_steps, full_table, main_table, place, saved, title
from .records import Measured, commands, measured, newest, runs_of, span, where

MAIN = "float8-row"
"""The fastest law, of which README has a table."""


def written(docs: Path) -> dict[str, str]:
    """Each block's text."""
    found = sorted(measured(docs, "quantised"), key=place)
    rows = []
    for m in found:
        columns = m.entry["columns"]
        if BF16.name in columns:
            gained = gains(columns)
            rows.append([m.entry["title"], *(f"{gained[kind]:.2f}" for kind in (SPEED, OVER_BF16, OTHER))])
    gain = table(["patched, quantised", "times as fast as torchao", "as patched bfloat16", "other time, of patched bfloat16's"], rows)
    listed = "; ".join(dict.fromkeys(where(run) for run in runs_of(found)))
    return {
        "float8": _float8([m for m in newest(found) if m.entry["quantization"] == MAIN]),
        "quantised": f"""Measured {listed}.

{commands(runs_of(found))}

{gain}

*other time*: of kernels outside matrix products and attention. {equal_steps(found)}

{main_table(found, BF16.name)}

{charts("Time of one denoising step of each quantised model in each column", "quantised", found)}

{full_table(found)}""",
    }


def _float8(found: list[Measured]) -> str:
    """A line a model, as the table of models in bfloat16 has one. Nothing where none was
    measured.
    """
    if not found:
        return ""
    rows = []
    for m in found:
        columns = m.entry["columns"]
        row = [title(m.entry).replace(f", {MAIN}", ""), m.card]
        row += [f"{columns[EAGER.name]['step_ms']:,.1f} ms", f"{columns[PATCHED.name]['step_ms']:,.1f} ms", f"**{-saved(m):+.0%}**"]
        compiled = columns.get(COMPILED)
        row.append("" if compiled is None else f"{compiled['step_ms']:,.1f} ms (first {compiled['first_step_s']:,.0f} s)")
        row.append(f"{columns[BF16.name]['step_ms']:,.1f} ms" if BF16.name in columns else "")
        rows.append(row)
    header = ["One denoising step, float8 per row", "GPU", "diffusers + torchao", "ditnorm", "", "torch.compile", "ditnorm, bfloat16"]
    return f"{table(header, rows, 2)}\n\nMeasured {span(runs_of(found))}. {equal_steps(found)}"


def in_words(docs: Path) -> str:
    """The largest gain over the patched model in bfloat16."""
    found = [m for m in newest(measured(docs, "quantised")) if BF16.name in m.entry["columns"]]
    best = max(found, key=lambda m: gains(m.entry["columns"])[OVER_BF16])
    before, after, bf16 = (best.entry["columns"][name]["step_ms"] for name in (EAGER.name, PATCHED.name, BF16.name))
    return f"{best.entry['title']}, {before:,.0f} → {after:,.0f} ms a step on {best.card}, where patched bfloat16 takes {bf16:,.0f}"
