"""The benchmark of the ops: ditnorm, eager PyTorch, torch.compile, other libraries' kernels, and plain copies of the same bytes.

    python scripts/bench_ops.py                   everything, 6 minutes on an H100 with every other library
    python scripts/bench_ops.py --quick           about a minute
    python scripts/bench_ops.py --cells nss/4096  the cells whose names contain this, e.g. nss/4096x3072/sample/bf16

Every contestant is captured in a CUDA graph of the same calls over the same random inputs, as many as exceed the L2 cache twice, and
the graphs are replayed in rotating order. Needs a GPU, nvcc, and pip install 'ditnorm[bench]'.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout's ditnorm, installed or not

import build_kernels
from bench import bars, contestants, environment, host, inductor, peers, picture, results, timing
from bench.cell_run import run_cell
from bench.cells import Cell, all_cells, quick_cells
from bench.light import Light

from ditnorm import kernels


def chosen_cells(quick: bool, patterns: Sequence[str]) -> list[Cell]:
    cells = quick_cells() if quick else all_cells()
    return [c for c in cells if not patterns or any(pattern in c.name for pattern in patterns)]


def unusable() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "it measures CUDA kernels, and PyTorch sees no CUDA GPU here"
    torch.ops.ditnorm.norm_scale_shift(torch.ones(1, 8, device="cuda"), None, None, None, None, None, None, None, 0, 1e-6, 0)
    if kernels.unavailable is not None:
        return f"ditnorm's CUDA kernels are unavailable: {kernels.unavailable}"
    return None


def measure(cells: Sequence[Cell], compiled: bool) -> results.Run:
    """The whole run, printing each cell as it is done."""
    light = Light()
    run = results.Run(environment.describe(peers.found()), timing.copy_bandwidth())
    tqdm.write(f"{environment.text(run.environment)}\ncopy bandwidth {run.copy_bytes_per_second / 1e12:.3f} TB/s\n")
    everyone = contestants.interpreted() + (contestants.compiled() if compiled else []) + contestants.importable()
    if compiled:
        start = time.perf_counter()
        filled = inductor.start_workers(Path(__file__), cells, tqdm.write)
        tqdm.write(f"compiled ahead for {filled} cells in {time.perf_counter() - start:.0f} s\n")
    run.host_seconds = host.measure(everyone, tqdm.write)
    for cell in (progress := tqdm(cells, unit="cell", smoothing=0.1)):
        progress.set_description(cell.name)
        try:
            result = run_cell(cell, everyone, light)
        except KeyboardInterrupt:
            tqdm.write(f"interrupted: {len(run.results)} of {len(cells)} cells are measured")
            break
        except Exception as error:  # a cell that fails as a whole must not cost the others
            tqdm.write(f"{cell.name}: {type(error).__name__}: {error}\n")
            continue
        finally:
            torch.cuda.empty_cache()
        run.results.append(result)
        tqdm.write(results.details(result, run.copy_bytes_per_second) + "\n")
    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells, no torch.compile")
    parser.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="only cells whose names contain one of these")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="for ops.json and ops.png (%(default)s)")
    parser.add_argument("--fill-caches", nargs="+", metavar="CELL", help=argparse.SUPPRESS)  # what a compile worker is started with
    options = parser.parse_args(argv)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is measured by then is kept
    if reason := unusable():
        print(f"bench_ops: {reason}", file=sys.stderr)
        return 2
    with torch.no_grad():
        torch.manual_seed(0)
        if options.fill_caches:
            inductor.fill([cell for cell in all_cells() if cell.name in options.fill_caches])
            return 0
        cells = chosen_cells(options.quick, options.cells)
        if not cells:
            print(f"bench_ops: no cell's name contains {' or '.join(options.cells)}", file=sys.stderr)
            return 2
        try:
            run = measure(cells, compiled=not (options.quick or options.no_compile))
        except build_kernels.BuildError as error:
            print(f"bench_ops: {error}", file=sys.stderr)
            return 2
    judged = bars.judge(run)
    options.out.mkdir(parents=True, exist_ok=True)
    run.save(options.out / "ops.json", [bar.as_dict() for bar in judged])
    picture.draw(run, options.out / "ops.png")
    print(f"\n{results.overview(run.results)}\n\n{host.table(run.host_seconds)}\n\n{bars.summary(judged)}")
    print(f"\n{options.out / 'ops.json'}, {options.out / 'ops.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
