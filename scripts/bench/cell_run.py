"""Runs one cell: every contestant that serves it, checked and timed side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cells import Cell, Inputs
from .contestants import EAGER, OURS, UNFUSED, Contestant, results
from .light import Light
from .precision import errors
from .results import CellResult, Entry
from .timing import Call, Recording, calls_in_graph, input_sets, measure, record

WRONG = 0.05  # relative error: ten times that of the coarsest honest contestant, bfloat16 rounded after every step


def run_cell(cell: Cell, contestants: Sequence[Contestant], light: Light) -> CellResult:
    """Measures one cell. What a contestant raises is its result; the others go on."""
    torch.compiler.reset()  # every cell compiles for its own sizes
    first = cell.inputs()
    sets = input_sets(sum(t.numel() * t.itemsize for t in first.values()))
    calls = calls_in_graph(sets, cell.bytes)
    inputs = [first, *(cell.inputs() for _ in range(sets - 1))]
    entries: dict[str, Entry] = {}
    recordings: dict[str, Recording] = {}
    for contestant in contestants:
        try:
            bound = _bind(contestant, cell, inputs)
            if bound is None:
                continue
            entries[contestant.name] = _checked(contestant.name, cell, first, bound[0])
            recordings[contestant.name] = record(bound, calls)
        except Exception as error:
            entries[contestant.name] = Entry(message=_brief(error))
    streaming = light.finalists(cell.streams, sets, calls)  # holds the tensors that the graphs read
    plain = {name: record(bound, calls) for name, bound in streaming.items()}
    timings = measure(recordings | plain)
    for name in recordings:
        entry, timing = entries[name], timings[name]
        entry.us, entry.low, entry.high = (seconds * 1e6 for seconds in (timing.median, timing.low, timing.high))
    fastest = min(plain, key=lambda name: timings[name].median)
    _compare_bits(cell, contestants, first, entries)
    return CellResult(cell, timings[fastest].median * 1e6, fastest, entries)


def _bind(contestant: Contestant, cell: Cell, inputs: Sequence[Inputs]) -> list[Call] | None:
    make = contestant.bind(cell)
    bound: list[Call] = []
    for one in inputs:
        call = make(one)
        if call is None:
            return None
        bound.append(call)
    return bound


def _checked(name: str, cell: Cell, inputs: Inputs, call: Callable[[], Any]) -> Entry:
    found = errors(cell, inputs, *results(cell.op, call()))
    if not found.total < WRONG:  # NaN too
        raise ValueError(f"the result is wrong: its error against float64 is {found.total:.2g}")
    return Entry(error=found.total, excess=found.excess if name in OURS else None)


def _compare_bits(cell: Cell, contestants: Sequence[Contestant], inputs: Inputs, entries: dict[str, Entry]) -> None:
    if EAGER not in entries or UNFUSED not in entries:
        return
    try:
        both = [next(c for c in contestants if c.name == name).bind(cell)(inputs) for name in (EAGER, UNFUSED)]
        ours, unfused = (results(cell.op, call()) for call in both if call is not None)
    except Exception:  # it has been reported where it was first called
        return
    pairs = [(a, b) for a, b in zip(ours, unfused, strict=True) if a is not None and b is not None]
    entries[EAGER].bits_equal = all(torch.equal(a, b) for a, b in pairs)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
