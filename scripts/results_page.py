"""Writes the page of results from what ``bench_transformers.py`` measured.

python scripts/results_page.py bench-output/transformers.json
python scripts/results_page.py --quantised float8-row/transformers.json int8-row/transformers.json
python scripts/results_page.py --families flux/transformers.json sd3/transformers.json

Copies the JSON and its chart to docs/ and writes docs/results.md. With --quantised: what several
runs with --quantization measured becomes docs/quantised.json and a section of the page; with
--families the same of runs of other models, maybe on another GPU, and docs/families.json. With
--training: what bench_training.py measured, and docs/training.json.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.models import accuracy
from bench.models.report import bits, layer_counts, notes
from bench.models.variants import BF16, EAGER, PATCHED, SINGLE, VARIANTS

DOCS = Path(__file__).parent.parent / "docs"
JSON, CHART, PAGE, TRAINING = "transformers.json", "transformers.png", "results.md", "training.json"


@dataclass(frozen=True)
class Section:
    """Runs that have a record and a section of the page of their own."""

    name: str
    """Of the option, and of the record in docs/."""
    title: str
    text: str
    columns: tuple[str, ...] = ()
    """Behind those of the main table."""

    def path(self, docs: Path) -> Path:
        return docs / f"{self.name}.json"


SECTIONS = (
    Section("families", "More families", "The same of models that were measured at another time, or on another GPU."),
    Section(
        "quantised",
        "Quantised weights",
        "The same with torchao's quantised weights and activations; \"eager\" is torchao's own. See [quantised.md](quantised.md).",
        (BF16.name,),
    ),
)


def main_table(entries: Mapping[str, Mapping[str, Any]], *others: str) -> str:
    """The table of the README: one line a model. ``others``: columns behind these."""
    found = {name for entry in entries.values() for name in entry.get("columns", ())}
    names = [name for name in ("patched", "compiled", "patched + compiled", *others) if name in found]
    lines = [
        f"| Model, one denoising step | layers | eager | {' | '.join(names)} | patched latents |",
        f"|---|---:|---:|{'---:|' * len(names)}---|",
    ]
    for entry in entries.values():
        if "error" in entry:
            lines.append(f"| {entry['title']} | {layer_counts(entry)} | {entry['error']} |{' |' * (len(names) + 1)}")
            continue
        columns = entry["columns"]
        eager = columns[EAGER.name]["step_ms"]
        cells = [f"{eager:,.1f} ms"]
        for name in names:
            cells.append(f"{columns[name]['step_ms']:,.1f} ms ({columns[name]['step_ms'] / eager - 1:+.1%})" if name in columns else "")
        lines.append(f"| {entry['title']} | {layer_counts(entry)} | {' | '.join(cells)} | {bits(entry, PATCHED.name)} |")
    return "\n".join(lines)


def runs_section(section: Section, record: Mapping[str, Any]) -> str:
    """A section of the page."""
    runs = record["runs"]
    entries = {key: entry for run in runs for key, entry in run["models"].items()}
    measured = ", ".join(dict.fromkeys(f"{run['date']}; {versions(run)}" for run in runs))
    commands = "\n".join(run["command"] for run in runs)
    return f"""## {section.title}

{section.text} Measured {measured}.

```sh
{commands}
```

{main_table(entries, *section.columns)}

{full_table(entries)}

"""


def training_section(record: Mapping[str, Any] | None) -> str:
    """One training step, a line a model, plan and column; nothing where there is no record."""
    if record is None:
        return ""
    lines = [
        "| Model | layers | trained | | step ms | times eager's speed | GPU ms | peak GB | first step s |",
        "|---|---:|---|---|" + "---:|" * 5,
    ]
    for entry in record["models"].values():
        layers = " + ".join(map(str, entry["layers"].values()))
        for plan, columns in entry["plans"].items():
            eager = columns[EAGER.name]["step_ms"]
            for name, column in columns.items():
                numbers = [
                    column["step_ms"],
                    eager / column["step_ms"],
                    column["shares"]["busy_ms"],
                    column["peak_gb"],
                    column["first_step_s"],
                ]
                cells = [f"{number:.{digits}f}" for number, digits in zip(numbers, (1, 2, 1, 2, 1), strict=True)]
                lines.append(f"| {entry['title']} | {layers} | {plan} | {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""## Training

One step of training: forward, backward and AdamW. A LoRA of rank 16 on the attention's linear layers, the base in bfloat16.
Measured {record["date"]}; {versions(record)}.

```sh
{record["command"]}
```

{table}

"""


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


def versions(run: Mapping[str, Any]) -> str:
    """Where it was measured."""
    return "; ".join(f"{key} {value}" for key, value in run["environment"].items())


def page(report: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """The whole page. ``records``: what was measured for its sections, by their names."""
    sections = "".join(runs_section(section, records[section.name]) for section in SECTIONS if records and section.name in records)
    sources = "\n".join(f"- {entry['title']}: `{entry['source']}`" for entry in report["models"].values())
    return f"""# Results

Whole denoising steps of real models, with random weights, in bfloat16. Measured {report["date"]}; {versions(report)}.

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

{accuracy_section(report["models"])}{sections}{training_section((records or {}).get("training"))}## Configurations

{sources}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/results.md from the JSON of bench_transformers.py.")
    parser.add_argument("json", type=Path, nargs="?", help="its chart lies beside it (default: the one in docs/)")
    for section in SECTIONS:
        parser.add_argument(f"--{section.name}", type=Path, nargs="+", default=[], metavar="JSON", help=f"of runs for {section.title!r}")
    parser.add_argument("--training", type=Path, metavar="JSON", help="of bench_training.py")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    if options.json is not None:
        for name in (JSON, CHART):
            shutil.copyfile(options.json.with_name(name), options.docs / name)
    for section in SECTIONS:
        if paths := getattr(options, section.name):
            runs = [json.loads(path.read_text()) for path in paths]
            section.path(options.docs).write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    if options.training is not None:
        shutil.copyfile(options.training, options.docs / TRAINING)
    write(options.docs)
    return 0


def write(docs: Path) -> None:
    """The page of the records in a folder."""
    (docs / PAGE).write_text(page(json.loads((docs / JSON).read_text()), records(docs)))


def records(docs: Path) -> Mapping[str, Mapping[str, Any]]:
    """What was measured for the sections, of those for which anything was."""
    paths = {section.name: section.path(docs) for section in SECTIONS} | {"training": docs / TRAINING}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    sys.exit(main())
