"""Writes all that README.md and the pages of docs/ show of measurements, from the records in docs/.

python scripts/results_page.py               after a record changed
python scripts/results_page.py bench-output  takes measurements into the records first
python scripts/results_page.py --check       changes nothing; fails where a page is out of date

It needs no GPU. A folder stands for all JSON files in it. Measurements replace what the records
have of the same models on the same device, and are otherwise added. scripts/results.py makes them.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.models import report
from bench.norm import picture
from bench.norm.cells import Cell
from bench.results import load
from bench.training import report as training_report
from pages import blocks, memory, models, ops, quantised, training, versions
from pages.records import DOCS, by_device, measured, take

ROOT = DOCS.parent
MORE = """\
- **Less memory.** `ditnorm.precompute_modulation(pipe)` keeps the weights that only see the timestep in host memory: {memory}. \
See [memory](docs/modulation.md).
- **Quantised weights.** torchao's float8 and int8 run fused, with torchao's bits: {quantised}. See [quantised weights](docs/quantised.md).
- **Training.** Calls are fused under grad, with the gradients of eager autograd: {training}. See [training](docs/training.md).
"""


def pages() -> list[Path]:
    """Those with parts that are written here."""
    return [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if blocks.names(page.read_text())]


def written(docs: Path) -> dict[Path, str]:
    """Each page as it should be."""
    made: dict[str, str] = {}
    for part in (models, quantised, memory, training, ops, versions):
        made |= part.written(docs)
    made["more"] = MORE.format(memory=memory.in_words(docs), quantised=quantised.in_words(docs), training=training.in_words(docs))
    return {page: blocks.filled(page.read_text(), made) for page in pages()}


def draw(docs: Path) -> None:
    """The pictures: of each device's steps, quantised and in training too, of all calls of the norm
    sites.
    """
    if (ops_record := docs / "ops.json").exists():
        picture.draw(load(ops_record, Cell), ops_record.with_suffix(".png"))
    for record, chart in (("transformers", report.chart), ("quantised", report.chart), ("training", training_report.chart)):
        for device, found in by_device(measured(docs, record)).items():
            chart([m.entry for m in sorted(found, key=models.place)], docs / models.chart_name(record, device), device)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, nargs="*", metavar="JSON", help="what the benchmarks wrote, or folders of it")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is out of date")
    options = parser.parse_args(argv)
    for path in _files(options.measurements):
        print("\n".join(take(path, DOCS)))
    if options.measurements:
        draw(DOCS)
    status = 0
    for page, text in written(DOCS).items():
        if page.read_text() == text:
            continue
        if options.check:
            print(f"{page.relative_to(ROOT)} is out of date: run python scripts/results_page.py")
            status = 1
        else:
            page.write_text(text)
            print(f"{page.relative_to(ROOT)}: written")
    return status


def _files(given: Sequence[Path]) -> Iterator[Path]:
    """The oldest first, so that the newest stays."""
    found = [file for path in given for file in (path.rglob("*.json") if path.is_dir() else [path])]
    yield from sorted(found, key=lambda file: file.stat().st_mtime)


if __name__ == "__main__":
    sys.exit(main())
