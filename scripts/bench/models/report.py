"""What ``bench_transformers.py`` found, as tables and as a chart. An entry is one model's part of
its JSON.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.tables import text_table

from .chart import draw
from .quantization import gains
from .variants import EAGER, PRECOMPUTED

PROFILED_SHARE = 0.01  # of a step's time, that a kernel must cost for --profile to list it

NOTES = """step ms: median wall time of one denoising step; GPU ms: sum over its kernels; first step: with the compiler's work.
kernels: launched in one step; other: share of GPU time outside matmul and attention; bits: latents of patched against eager.
patched, single: with rounding="single", which isn't bit-identical, but nearer to float32 or as near."""
_PRECOMPUTED = "patched, precomputed: with precompute_modulation; table s: making the table of 50 steps, inside the first step."


def notes(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """What the columns of ``entries`` mean."""
    precomputed = any(PRECOMPUTED.name in entry.get("columns", ()) for entry in entries.values())
    return f"{NOTES}\n{_PRECOMPUTED}" if precomputed else NOTES


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text."""
    rows = [["model", "layers", "", "step ms", "vs eager", "GPU ms", "first step s", "kernels", "peak GB", "table s", "other", "bits"]]
    for entry in entries.values():
        if "error" in entry:
            continue
        eager = entry["columns"][EAGER.name]["step_ms"]
        for index, (name, column) in enumerate(entry["columns"].items()):
            shares = column["shares"]
            rows.append(
                [
                    entry["title"] if index == 0 else "",
                    layer_counts(entry) if index == 0 else "",
                    name,
                    f"{column['step_ms']:.1f}",
                    "" if index == 0 else f"{column['step_ms'] / eager - 1:+.1%}",
                    f"{shares['busy_ms']:.1f}",
                    f"{column['first_step_s']:.1f}",
                    str(shares["kernels"]),
                    "" if column["peak_gb"] is None else f"{column['peak_gb']:.2f}",
                    "" if column.get("table_s") is None else f"{column['table_s']:.2f}",
                    f"{column['other_share']:.1%}",
                    bits(entry, name),
                ]
            )
    errors = [f"{entry['title']}: {entry['error']}" for entry in entries.values() if "error" in entry]
    return "\n".join([text_table(rows), *errors])


def gain_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """What patching the quantised models is worth."""
    found = {entry["title"]: gains(entry["columns"]) for entry in entries.values() if "quantization" in entry and "error" not in entry}
    kinds = list(dict.fromkeys(kind for of_model in found.values() for kind in of_model))
    rows = [["patched is", *found]]
    rows += [[kind, *(f"{of_model[kind]:.2f}" if kind in of_model else "" for of_model in found.values())] for kind in kinds]
    return text_table(rows)


def layer_counts(entry: Mapping[str, Any]) -> str:
    """Measured layers of all."""
    return " + ".join(f"{n}/{entry['all_layers'][kind]}" for kind, n in entry["layers"].items())


def bits(entry: Mapping[str, Any], name: str) -> str:
    """What the comparison of a variant with eager found; nothing for one that promises no equal
    bits.
    """
    identical = entry["columns"][name].get("steps_identical")
    if identical is None:
        return ""
    counts = f"{identical} of {entry['steps_compared']} steps equal"
    return counts if entry["eager_reproducible"] else f"{counts}; eager itself isn't reproducible"


def profile_table(entry: Mapping[str, Any]) -> str:
    """What costs more than a hundredth of a step's GPU time outside matmul and attention, side by
    side.
    """
    names = list(entry["costs"])
    busy = {name: entry["columns"][name]["shares"]["busy_ms"] for name in names}
    found = {name: dict(entry["costs"][name]) for name in names}
    for name in names:
        found[name]["all of these and smaller ones"] = tuple(map(sum, zip((0, 0.0), *found[name].values(), strict=True)))
    kernels = dict.fromkeys(kernel for name in names for kernel in found[name])
    largest = {kernel: max(found[name].get(kernel, (0, 0.0))[1] / busy[name] for name in names) for kernel in kernels}
    rows = [["outside matmul and attention", *(f"{name} {column}" for name in names for column in ("launches", "ms", "share"))]]
    for kernel in sorted((kernel for kernel in kernels if largest[kernel] > PROFILED_SHARE), key=lambda kernel: -largest[kernel]):
        cells = [found[name].get(kernel) for name in names]
        rows.append(
            [kernel]
            + [
                text
                for name, cell in zip(names, cells, strict=True)
                for text in (("", "", "") if cell is None else (str(cell[0]), f"{cell[1]:.2f}", f"{cell[1] / busy[name]:.1%}"))
            ]
        )
    return text_table(rows)


def chart(entries: Iterable[Mapping[str, Any]], path: Path, device: str) -> None:
    """Bars: time of a step of each model in each column, eager = 100 %."""
    good = [entry for entry in entries if "error" not in entry]
    draw({f"{entry['title']}\n{layer_counts(entry)} layers": entry["columns"] for entry in good}, path, "one denoising step", device)
