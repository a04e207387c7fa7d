"""The benchmark of the ops of query and key: ditnorm, eager PyTorch, torch.compile, other
libraries' kernels, and plain copies.

    python scripts/bench_qk.py              everything, 4 minutes on an H100 with every other
                                            library
    python scripts/bench_qk.py --quick      about a minute
    python scripts/bench_qk.py --cells Wan  the cells whose names contain this

Method: as scripts/bench_ops.py. The plain copy moves the rows alone, without the rotary tables,
which a call reads besides. Other libraries take part where they can be imported and serve the cell,
and are right: bench/qk/peers.py tells which kernels, and how they are called. Needs a GPU, nvcc,
and pip install 'ditnorm[bench]'. Writes qk.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout's ditnorm, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.command import Benchmark
from bench.host import SIZE
from bench.qk import contestants, peers
from bench.qk.cells import CELLS, QKCell

HEAD_DIM = 128

BENCHMARK = Benchmark(
    script=Path(__file__),
    output="qk",
    cells=CELLS,
    quick=[cell for cell in CELLS if cell.tokens <= 4096],
    interpreted=contestants.interpreted,
    compiled=contestants.compiled,
    peers=peers.found,
    check=contestants.check,
    host_cells={
        "joint_qk_norm_rope": QKCell("host", SIZE[0], SIZE[1] // HEAD_DIM, HEAD_DIM, encoder=128),
        "qk_norm_rope": QKCell("host", SIZE[0], SIZE[1] // HEAD_DIM, HEAD_DIM, rotary="per_pair", across=True),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return BENCHMARK.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
