"""The benchmark of the ops of norm and residual: ditnorm, eager PyTorch, torch.compile, other
libraries' kernels, and plain copies.

    python scripts/bench_ops.py                   everything, 6 minutes on an H100 with every other
                                                  library
    python scripts/bench_ops.py --quick           about a minute
    python scripts/bench_ops.py --cells nss/4096  the cells whose names contain this, e.g.
                                                  nss/4096x3072/sample/bf16

Every contestant is captured in a CUDA graph of the same calls over the same random inputs, as many
as exceed the L2 cache twice, and the graphs are replayed in rotating order. Needs a GPU, nvcc, and
pip install 'ditnorm[bench]'. Writes ops.json and ops.png.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout's ditnorm, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.command import Benchmark, Finished
from bench.host import SIZE
from bench.norm import bars, contestants, peers, picture, precision
from bench.norm.cells import MODULATIONS, Cell, all_cells, quick_cells
from bench.results import Run


def finish(run: Run[Cell], folder: Path) -> Finished:
    """Judges the bars and draws the picture."""
    judged = bars.judge(run)
    path = folder / "ops.png"
    picture.draw(run, path)
    return Finished([bar.as_dict() for bar in judged], [bars.summary(judged)], [path])


BENCHMARK = Benchmark(
    script=Path(__file__),
    output="ops",
    cells=all_cells(),
    quick=quick_cells(),
    interpreted=contestants.interpreted,
    compiled=contestants.compiled,
    peers=peers.found,
    check=precision.check,
    host_cells={op: Cell(op, *SIZE, group="anchors") for op in MODULATIONS},
    finish=finish,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return BENCHMARK.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
