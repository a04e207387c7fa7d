"""The benchmark of GELU and SwiGLU: ditnorm, eager PyTorch, torch.compile, and plain copies.

    python scripts/bench_activation.py              three minutes on an H100
    python scripts/bench_activation.py --quick      half a minute
    python scripts/bench_activation.py --cells FLUX the cells whose names contain this

Method: as scripts/bench_ops.py. What is read are views of one projection, and attention's result
where a block joins the two. Needs a GPU, nvcc, and pip install 'ditnorm[bench]'. Writes
activation.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout's ditnorm, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.activation import contestants
from bench.activation.cells import CELLS, ActivationCell
from bench.command import Benchmark
from bench.host import SIZE
from bench.libraries import Found

BENCHMARK = Benchmark(
    script=Path(__file__),
    output="activation",
    cells=CELLS,
    quick=[cell for cell in CELLS if "1024x1024" in cell.name or cell.tokens == 128],
    interpreted=contestants.interpreted,
    compiled=contestants.compiled,
    peers=Found,
    check=contestants.check,
    host_cells={op: ActivationCell("host", op, *SIZE, SIZE[1]) for op in ("gelu", "swiglu")},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return BENCHMARK.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
