"""The benchmark of the quantising ops: ditnorm, the eager and compiled expressions of diffusers and
torchao, other libraries' quantisers, and plain copies.

    python scripts/bench_quantize.py                     two minutes on an H100
    python scripts/bench_quantize.py --quick             some of the cells
    python scripts/bench_quantize.py --cells nss_quant   the cells whose names contain this

Method: as scripts/bench_ops.py. The plain copy moves the rows in their bytes, the quantised ones
being half as large; for a law with one scale for all rows it reads them twice. Needs a GPU of
compute capability 8.9, nvcc, and pip install 'ditnorm[bench]'. Writes quantize.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout's ditnorm, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.command import Benchmark
from bench.host import SIZE
from bench.quantized import contestants, peers
from bench.quantized.cells import CELLS, OPS, QuantizedCell

BENCHMARK = Benchmark(
    script=Path(__file__),
    output="quantize",
    cells=CELLS,
    quick=[cell for cell in CELLS if cell.rows == 27030 and cell.law == "float8-row" and cell.dtype == "bf16"],
    interpreted=contestants.interpreted,
    compiled=contestants.compiled,
    peers=peers.found,
    check=contestants.check,
    host_cells={op: QuantizedCell(op, *SIZE) for op in OPS},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return BENCHMARK.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
