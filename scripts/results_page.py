"""Writes the page of results from what ``bench_transformers.py`` measured.

python scripts/results_page.py bench-output/transformers.json

Copies the JSON and its chart to docs/ and writes docs/results.md.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.models import accuracy
from bench.models.report import bits, layer_counts, notes
from bench.models.variants import EAGER, PATCHED, SINGLE, VARIANTS

DOCS = Path(__file__).parent.parent / "docs"
JSON, CHART, PAGE = "transformers.json", "transformers.png", "results.md"


def main_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the README: one line a model."""
    lines = [
        "| Model, one denoising step | layers | eager | patched | compiled | patched + compiled | patched latents |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for entry in entries.values():
        if "error" in entry:
            lines.append(f"| {entry['title']} | {layer_counts(entry)} | {entry['error']} | | | | |")
            continue
        columns = entry["columns"]
        eager = columns[EAGER.name]["step_ms"]
        cells = [f"{eager:,.1f} ms"]
        for name in ("patched", "compiled", "patched + compiled"):
            cells.append(f"{columns[name]['step_ms']:,.1f} ms ({columns[name]['step_ms'] / eager - 1:+.1%})" if name in columns else "")
        lines.append(f"| {entry['title']} | {layer_counts(entry)} | {' | '.join(cells)} | {bits(entry, PATCHED.name)} |")
    return "\n".join(lines)


def full_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Everything measured: one line a model and column."""
    lines = [
        "| Model | tokens | | step ms | GPU ms | first step s | kernels | peak GB | outside matmul and attention |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries.values():
        for name, column in entry.get("columns", {}).items():
            shares, peak = column["shares"], column["peak_gb"]
            numbers = [
                f"{column['step_ms']:,.1f}",
                f"{shares['busy_ms']:,.1f}",
                f"{column['first_step_s']:.1f}",
                f"{shares['kernels']:,}",
                "" if peak is None else f"{peak:.2f}",
                f"{column['other_share']:.1%}",
            ]
            lines.append(f"| {entry['title']} | {entry['tokens']:,} | {name} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def accuracy_section(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The errors against float32, one line a model, with a heading; nothing where none was
    measured.
    """
    measured = [entry for entry in entries.values() if "accuracy" in entry]
    if not measured:
        return ""
    names = [variant.name for variant in VARIANTS if variant.accuracy]
    lines = [f"| Model | blocks | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for entry in measured:
        errors = entry["accuracy"]["errors"]
        cells = [accuracy_cell(name, errors) for name in names]
        lines.append(f"| {entry['title']} | {accuracy.blocks(entry['accuracy'])} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""## Error of one step against float32

The relative error of what the model makes of noise at the first step, in the Euclidean norm, and the PSNR, whose peak is the largest value.
float32: the unpatched model with the same weights and inputs, without TF32. As that is slow, of every model a few blocks, at full size.
Percentages: change of the error from eager's, ± its standard error if values err independently: a change of a few times that is chance.

{table}

"""


def accuracy_cell(name: str, errors: Mapping[str, Mapping[str, float]]) -> str:
    """One way's error; the more accurate rounding's also as a change from eager's."""
    if name not in errors:
        return ""
    found = errors[name]
    change = f", {found['relative'] / errors[EAGER.name]['relative'] - 1:+.2%} ± {found['chance']:.2%}" if name == SINGLE.name else ""
    return f"{found['relative']:.3e} ({found['psnr']:.1f} dB{change})"


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    versions = "; ".join(f"{key} {value}" for key, value in report["environment"].items())
    sources = "\n".join(f"- {entry['title']}: `{entry['source']}`" for entry in report["models"].values())
    return f"""# Results

Whole denoising steps of real models, with random weights, in bfloat16. Measured {report["date"]}; {versions}.

```sh
{report["command"]}
python scripts/results_page.py bench-output/transformers.json
```

{main_table(report["models"])}

![Time of one denoising step of each model: eager, patched, compiled, patched and compiled]({CHART})

"layers" are those measured, of those that the model has: with fewer, the step is that much shorter and the shares are nearly the same.
"compiled" is `compile_repeated_blocks(fullgraph=True)`. "patched latents": against eager, bit for bit, after each of the first steps.

## Everything

{full_table(report["models"])}

{notes(report["models"])}

{accuracy_section(report["models"])}## Configurations

{sources}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/results.md from the JSON of bench_transformers.py.")
    parser.add_argument("json", type=Path, help="its chart lies beside it")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    for name in (JSON, CHART):
        shutil.copyfile(options.json.with_name(name), options.docs / name)
    (options.docs / PAGE).write_text(page(json.loads((options.docs / JSON).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
