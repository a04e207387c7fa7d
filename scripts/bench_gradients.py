"""The benchmark of the kernels that make gradients of rows: ditnorm, the formulas in PyTorch's
operations, plain and compiled, and plain copies.

    python scripts/bench_gradients.py                       two minutes on an H100
    python scripts/bench_gradients.py --quick               some of the cells
    python scripts/bench_gradients.py --cells sr_nss        the cells whose names contain this

Method: as scripts/bench_ops.py. The plain copy moves the rows and their gradients. Last comes the
host's time of a call under grad and its backward pass. Needs a GPU, nvcc, and
pip install 'ditnorm[bench]'. Writes gradients.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout's ditnorm, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import host
from bench.command import Benchmark, Finished
from bench.gradients import contestants
from bench.gradients import host as under_grad
from bench.gradients.cells import CELLS, OPS, GradientCell
from bench.libraries import Found
from bench.results import Run


def finish(run: Run[GradientCell], folder: Path) -> Finished:
    """The host's time of training, too."""
    return Finished(texts=[host.table(host.timed(under_grad.calls()), "a call and its backward pass")])


BENCHMARK = Benchmark(
    script=Path(__file__),
    output="gradients",
    cells=CELLS,
    quick=[cell for cell in CELLS if cell.rows in (4096, 27030, 32760) and cell.dtype == "bf16"],
    interpreted=contestants.interpreted,
    compiled=contestants.compiled,
    peers=Found,
    check=contestants.check,
    host_cells={op: GradientCell(op, *host.SIZE) for op in OPS},
    finish=finish,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return BENCHMARK.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
