"""Runs one cell: every contestant that serves it, checked and timed side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cell import C, Inputs, tensors
from .contestants import EAGER, OURS, UNFUSED, Call, Contestant
from .light import Light
from .results import CellResult, Entry
from .timing import Recording, calls_in_graph, input_sets, measure, record


@dataclass
class Verdict:
    """How exact a result is; relative L2 errors, None where a benchmark measures none."""

    error: float | None = None
    """Against the exact result."""
    excess: float | None = None
    """The error given what else the call stored, over that of rounding the exact value once: 1 is
    the best that the dtype allows.
    """


Check = Callable[[Any, Inputs], Callable[[Any], Verdict]]
"""For a cell and its inputs, what judges the result of a call; it raises where that is wrong."""


def run_cell(cell: C, contestants: Sequence[Contestant], light: Light, check: Check) -> CellResult[C]:
    """Measures one cell. What a contestant raises is its result; the others go on."""
    torch.compiler.reset()  # every cell compiles for its own sizes
    first = cell.inputs()
    sets = input_sets(sum(t.numel() * t.itemsize for t in tensors(first)))
    calls = calls_in_graph(sets, cell.bytes)
    inputs = [first, *(cell.inputs() for _ in range(sets - 1))]
    judge = check(cell, first)
    entries: dict[str, Entry] = {}
    recordings: dict[str, Recording] = {}
    for contestant in contestants:
        try:
            bound = _bind(contestant, cell, inputs)
            if bound is None:
                continue
            found = judge(bound[0]())
            torch.cuda.empty_cache()  # a graph can't use the memory that the check has kept
            recordings[contestant.name] = record(bound, calls)
            entries[contestant.name] = Entry(error=found.error, excess=found.excess if contestant.name in OURS else None)
        except Exception as error:
            entries[contestant.name] = Entry(message=_brief(error))
    plain = {name: record(bound, calls) for name, bound in light.finalists(cell.streams, sets, calls).items()}
    timings = measure(recordings | plain)
    for name in recordings:
        entry, timing = entries[name], timings[name]
        entry.us, entry.low, entry.high = (seconds * 1e6 for seconds in (timing.median, timing.low, timing.high))
    if {EAGER, UNFUSED} <= recordings.keys():
        entries[EAGER].bits_equal = _equal(recordings[EAGER].bound[0], recordings[UNFUSED].bound[0])
    fastest = min(plain, key=lambda name: timings[name].median)
    return CellResult(cell, timings[fastest].median * 1e6, fastest, entries)


def _bind(contestant: Contestant, cell: C, inputs: Sequence[Inputs]) -> list[Call] | None:
    make = contestant.bind(cell)
    bound: list[Call] = []
    for one in inputs:
        call = make(one)
        if call is None:
            return None
        bound.append(call)
    return bound


def _equal(ours: Call, unfused: Call) -> bool:
    return all(torch.equal(_comparable(a), _comparable(b)) for a, b in zip(tensors(ours()), tensors(unfused()), strict=True))


def _comparable(result: torch.Tensor) -> torch.Tensor:
    return result.view(torch.uint8) if result.itemsize == 1 else result  # PyTorch compares no float8


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
