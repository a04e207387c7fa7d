"""The benchmark of the norm sites of diffusers' RMSNorm: ditnorm, eager PyTorch, torch.compile, and
plain copies.

    python scripts/bench_sandwich.py                 three minutes on an H100
    python scripts/bench_sandwich.py --quick         half a minute
    python scripts/bench_sandwich.py --cells Z-Image the cells whose names contain this

Method: as scripts/bench_ops.py. The plain copy moves the rows alone. Needs a GPU, nvcc, and
pip install 'ditnorm[bench]'. Writes sandwich.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout's ditnorm, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.command import Benchmark
from bench.host import SIZE
from bench.libraries import Found
from bench.sandwich import contestants
from bench.sandwich.cells import CELLS, OPS, SandwichCell

BENCHMARK = Benchmark(
    script=Path(__file__),
    output="sandwich",
    cells=CELLS,
    quick=[cell for cell in CELLS if cell.dtype == "bf16" and cell.rows < 6000],
    interpreted=contestants.interpreted,
    compiled=contestants.compiled,
    peers=Found,
    check=contestants.check,
    host_cells={op: SandwichCell("host", op, *SIZE) for op in OPS},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return BENCHMARK.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
