"""The command around a benchmark of ops: its options, the loop over the cells, what it prints and
writes.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import build_kernels
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ditnorm import functional, kernels

from . import environment, host, inductor, results, timing
from .cell import C
from .cell_run import Check, run_cell
from .contestants import Contestant
from .libraries import Found
from .light import Light


@dataclass
class Finished:
    """What a benchmark makes of a run besides the figures of its cells."""

    bars: Sequence[Mapping[str, Any]] = ()
    """For the JSON."""
    texts: Sequence[str] = ()
    """To print."""
    files: Sequence[Path] = ()
    """Written besides the JSON."""


@dataclass(frozen=True)
class Benchmark(Generic[C]):
    """What one benchmark measures, and who takes part."""

    script: Path
    output: str
    """Of the JSON, without its suffix."""
    cells: Sequence[C]
    quick: Sequence[C]
    """A minute's worth."""
    interpreted: Callable[[], list[Contestant]]
    compiled: Callable[[], list[Contestant]]
    peers: Callable[[], Found]
    check: Check
    host_cells: Mapping[str, C]
    """For the host's time of a call, by the name of the op."""

    finish: Callable[[results.Run[C], Path], Finished] = lambda run, folder: Finished()
    """Makes of a run what goes with its cells, in the folder of the output."""

    def main(self, about: str | None, argv: Sequence[str] | None) -> int:
        """Runs it; returns the exit status."""
        options = self._parse(about, argv)
        # What is measured by then is kept.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with torch.no_grad():
            torch.manual_seed(0)
            try:
                if reason := _unusable():
                    return self._fail(reason)
                if options.fill_caches:
                    inductor.fill([cell for cell in self.cells if cell.name in options.fill_caches], self.compiled())
                    return 0
                chosen = [c for c in (self.quick if options.quick else self.cells) if any(pattern in c.name for pattern in options.cells)]
                if not chosen:
                    return self._fail(f"no cell's name contains {' or '.join(options.cells)}")
                run = self._measure(chosen, compiled=not (options.quick or options.no_compile))
            except build_kernels.BuildError as error:
                return self._fail(str(error))
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{self.output}.json"
        finished = self.finish(run, options.out)
        run.save(path, finished.bars)
        print("\n\n".join(["", results.overview(run.results), host.table(run.host_seconds), *finished.texts]))
        print(f"\n{', '.join(map(str, [path, *finished.files]))}")
        return 0

    def _parse(self, about: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="a few cells, no torch.compile")
        parser.add_argument("--cells", nargs="+", default=[""], metavar="PATTERN", help="only cells whose names contain one of these")
        parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
        parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="for what it writes (%(default)s)")
        # What a compile worker is started with.
        parser.add_argument("--fill-caches", nargs="+", metavar="CELL", help=argparse.SUPPRESS)
        return parser.parse_args(argv)

    def _fail(self, reason: str) -> int:
        print(f"{self.script.stem}: {reason}", file=sys.stderr)
        return 2

    def _measure(self, cells: Sequence[C], compiled: bool) -> results.Run[C]:
        """The whole run, printing each cell as it is done."""
        light = Light()
        peers = self.peers()
        run: results.Run[C] = results.Run(environment.describe(peers), timing.copy_bandwidth())
        tqdm.write(f"{environment.text(run.environment)}\ncopy bandwidth {run.copy_bytes_per_second / 1e12:.3f} TB/s\n")
        everyone = self.interpreted() + (self.compiled() if compiled else []) + peers.available
        if compiled:
            start = time.perf_counter()
            filled = inductor.start_workers(self.script, cells, tqdm.write)
            tqdm.write(f"compiled ahead for {filled} cells in {time.perf_counter() - start:.0f} s\n")
        run.host_seconds = host.measure(self.host_cells, everyone, tqdm.write)
        for cell in (progress := tqdm(cells, unit="cell", smoothing=0.1)):
            progress.set_description(cell.name)
            try:
                result = run_cell(cell, everyone, light, self.check)
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


def _unusable() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "it measures CUDA kernels, and PyTorch sees no CUDA GPU here"
    functional.norm_scale_shift(torch.ones(1, 8, device="cuda"))
    if kernels.unavailable is not None:
        return f"ditnorm's CUDA kernels are unavailable: {kernels.unavailable}"
    return None
