"""Writes the tables of README.md and docs/kernels.md that come from docs/ops.json and docs/qk.json.

python scripts/op_tables.py                         after docs/ops.json or docs/qk.json changed
python scripts/op_tables.py --results bench-output  copies what bench_ops.py and bench_qk.py wrote
                                                    there to docs/ first
python scripts/op_tables.py --check                 changes nothing; fails where a table is out of
                                                    date
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import tables
from bench.norm.cells import Cell
from bench.qk.cells import QKCell
from bench.results import load

ROOT = Path(__file__).parent.parent
FILES = ("ops.json", "ops.png", "qk.json")


def written(docs: Path) -> dict[Path, str]:
    """Each page as it should be."""
    ops, qk = load(docs / "ops.json", Cell), load(docs / "qk.json", QKCell)
    readme, kernels = ROOT / "README.md", ROOT / "docs" / "kernels.md"
    made = {
        readme: [tables.norm_in_readme(ops), tables.qk_in_readme(qk)],
        kernels: [tables.norm_in_kernels(ops), tables.qk_in_kernels(qk)],
    }
    pages = {page: page.read_text() for page in made}
    for page, new in made.items():
        for table in new:
            pages[page] = tables.replaced(pages[page], table)
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="DIR", help=f"where {', '.join(FILES)} are copied from")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is out of date")
    options = parser.parse_args(argv)
    docs = ROOT / "docs"
    if options.results is not None:
        for name in FILES:
            if (options.results / name).exists():
                shutil.copyfile(options.results / name, docs / name)
    status = 0
    for page, text in written(docs).items():
        if page.read_text() == text:
            continue
        if options.check:
            print(f"{page.relative_to(ROOT)} is out of date: run python scripts/op_tables.py")
            status = 1
        else:
            page.write_text(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
