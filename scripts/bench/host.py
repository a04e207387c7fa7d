"""Host time of one eager call while the GPU is kept behind: it sleeps, so that no call waits for it."""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .cells import NSS, SR, SRNSS, Cell
from .contestants import AUTOTUNED, Contestant
from .timing import SLEEP_CYCLES_PER_SECOND

CELL = (128, 3072)
CALLS = 50  # the launches of as many calls of an unfused chain fit into the driver's queue of 1024
REPEATS = 15
SLOWEST_CALL = 400e-6
LAYER_NORM, ADD = "F.layer_norm", "x + x"


def measure(contestants: list[Contestant], warn: Callable[[str], None]) -> dict[str, float]:
    """Seconds of one call: the median over rotating repeats, by ``"op: contestant"``."""
    calls: dict[str, Callable[[], Any]] = {}
    for op in (NSS, SRNSS, SR):
        cell = Cell(op, *CELL, group="anchors")
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
    x = Cell(NSS, *CELL).inputs()["x"]
    calls[LAYER_NORM] = functools.partial(F.layer_norm, x, CELL[1:], None, None, 1e-6)
    calls[ADD] = functools.partial(torch.add, x, x)
    return rotate(calls)


def rotate(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
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


def _once(call: Callable[[], Any]) -> float:
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CALLS * SLOWEST_CALL * SLEEP_CYCLES_PER_SECOND))
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return seconds


def table(seconds: Mapping[str, float]) -> str:
    """Microseconds of a call and the ratio to ``F.layer_norm``."""
    norm = seconds[LAYER_NORM]
    lines = [f"{'host time of a call at 128 x 3072, GPU kept behind':<62}      us   / F.layer_norm"]
    order = sorted(seconds, key=lambda name: (": " in name, name.split(": ")[0], seconds[name]))
    lines += [f"{name:<62}{seconds[name] * 1e6:8.2f}{seconds[name] / norm:9.2f}" for name in order]
    return "\n".join(lines)
