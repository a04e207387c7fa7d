"""Fills Inductor's caches before anything is timed: worker processes compile side by side, but only
one of them times kernels at a time.
"""

import fcntl
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cell import Cell
from .contestants import Contestant

MOST_WORKERS = 12
LOCK = "DITNORM_BENCH_LOCK"


def start_workers(script: Path, cells: Sequence[Cell], report: Callable[[str], None]) -> int:
    """Compiles the cells' expressions in processes of their own; returns how many cells that
    was.
    """
    chosen = [cell.name for cell in cells if cell.compiled]
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)), len(chosen))
    if workers < 2:
        return 0
    # Autotuned cells take longest: dealt out evenly.
    chosen.sort(key=lambda name: next(not cell.autotune for cell in cells if cell.name == name))
    with tempfile.NamedTemporaryFile() as lock:
        environment = os.environ | {LOCK: lock.name, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, str(script), "--fill-caches"]
        running = [
            subprocess.Popen([*command, *chosen[i::workers]], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for i in range(workers)
        ]
        for process in running:
            _, messages = process.communicate()
            if process.returncode:
                report(f"a compile worker failed with exit status {process.returncode}: {messages.strip()[-300:]}")
    return len(chosen)


def fill(cells: Sequence[Cell], compiled: Sequence[Contestant]) -> None:
    """The work of one process: calls every compiled contestant once in each cell."""
    _time_alone(os.environ[LOCK])
    for cell in cells:
        inputs = cell.inputs()
        for contestant in compiled:
            torch.compiler.reset()
            try:
                call = contestant.bind(cell)(inputs)
                if call is not None:
                    call()
                    torch.cuda.synchronize()
            except Exception as error:  # the run itself meets it again and reports it
                print(f"{cell.name}, {contestant.name}: {error}", file=sys.stderr)
        torch.cuda.empty_cache()


def _time_alone(lock: str) -> None:
    """Lets Inductor time its candidates only while no other worker does: contended timings would
    choose the wrong kernels.
    """
    from torch._inductor.runtime.benchmarking import benchmarker

    time_gpu = benchmarker.benchmark_gpu

    @functools.wraps(time_gpu)
    def alone(*arguments: Any, **options: Any) -> Any:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return time_gpu(*arguments, **options)

    benchmarker.benchmark_gpu = alone  # type: ignore[method-assign]
