"""Host time of one eager call while the GPU is kept behind: it sleeps, so that no call waits for
it.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from common.tables import text_table

from .cell import EPS, Cell
from .contestants import AUTOTUNED, Call, Contestant
from .timing import SLEEP_CYCLES_PER_SECOND

SIZE = (128, 3072)
CALLS = 50  # the launches of as many calls of an unfused norm fit into the driver's queue of 1024
REPEATS = 15
SLOWEST_CALL = 400e-6
LAYER_NORM, ADD = "F.layer_norm", "x + x"


def measure(cells: Mapping[str, Cell], contestants: Sequence[Contestant], warn: Callable[[str], None]) -> dict[str, float]:
    """Seconds of one call: the median over rotating repeats, by ``"op: contestant"``. ``cells``: of
    each op one of :data:`SIZE`.
    """
    calls: dict[str, Call] = {}
    for op, cell in cells.items():
        inputs = cell.inputs()
        for contestant in contestants:
            if contestant.name == AUTOTUNED:
                continue  # the same wrapper as torch.compile's default
            name = f"{op}: {contestant.name}"
            try:
                call = contestant.bind(cell)(inputs)
                if call is not None:
                    call()
                    calls[name] = call
            except Exception as error:
                warn(f"{name}: {error}")
    x = torch.randn(1, *SIZE, dtype=torch.bfloat16, device="cuda")
    calls[LAYER_NORM] = functools.partial(F.layer_norm, x, SIZE[1:], None, None, EPS)
    calls[ADD] = functools.partial(torch.add, x, x)
    return timed(calls)


def timed(calls: Mapping[str, Call]) -> dict[str, float]:
    """Seconds of each call: the median over rotating repeats."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.disable()
    try:
        for turn in range(REPEATS):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                samples[name].append(_once(calls[name]))
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}


def _once(call: Call) -> float:
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CALLS * SLOWEST_CALL * SLEEP_CYCLES_PER_SECOND))
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return seconds


def table(seconds: Mapping[str, float], what: str = "a call") -> str:
    """Microseconds of a call and the ratio to ``F.layer_norm``."""
    rows = [[f"host time of {what} at {SIZE[0]} x {SIZE[1]}, GPU kept behind", "us", f"/ {LAYER_NORM}"]]
    order = sorted(seconds, key=lambda name: (": " in name, name.split(": ")[0], seconds[name]))
    rows += [[name, f"{seconds[name] * 1e6:.2f}", f"{seconds[name] / seconds[LAYER_NORM]:.2f}"] for name in order]
    return text_table(rows)
