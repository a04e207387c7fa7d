"""The bars that the ops are held to, judged on a run's results: how many cells hold each, and which
don't.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..contestants import COMPILED, EAGER, OURS, SINGLE, UNFUSED
from ..host import LAYER_NORM
from ..results import CellResult, Run
from .cells import NSS, SR, SRNSS, Cell

Result = CellResult[Cell]

NOISE = 1.02
LARGE, MIDDLE = 200e6, 50e6  # bytes
LATENCY_ROWS, LATENCY_ALLOWANCE = 128, 0.5  # at most so many microseconds above the speed of light
GENERIC_FACTOR = 4.0  # the generic kernel against the aligned neighbour
ROUNDED_ONCE = 1.02
HOST_LIMITS = {NSS: 1.0, SR: 1.0, SRNSS: 1.25}  # of F.layer_norm
GEOMETRIC = {"sglang": 1.12, COMPILED: 1.7}


@dataclass
class Bar:
    """One bar: in how many cells it applies, and a line for each that misses it."""

    name: str
    judged: int = 0
    misses: list[str] = field(default_factory=list)

    @property
    def held(self) -> int:
        return self.judged - len(self.misses)

    def judge(self, cell: str, value: float, limit: float, unit: str) -> None:
        """Records a value that must not exceed the limit; NaN does."""
        self.judged += 1
        if not value <= limit:
            self.misses.append(f"{cell}: {value:.3f}{unit}, at most {limit:.3f} ({value / limit - 1:+.1%})")

    def as_dict(self) -> dict[str, Any]:
        return {"bar": self.name, "judged": self.judged, "held": self.held, "misses": self.misses}


def judge(run: Run[Cell]) -> list[Bar]:
    """Every bar; those that nothing in this run speaks of are left out."""
    aligned = [r for r in run.results if r.cell.aligned]
    bars = [
        _against_light(aligned, SINGLE, _single_limit),
        _against_light(aligned, EAGER, _eager_limit),
        _bits(run.results),
        _against_peers(aligned, SINGLE, lambda r: NOISE),
        _against_peers(aligned, EAGER, lambda r: NOISE if r.cell.bytes >= LARGE else 1.15),
        *(_geometric(run.results, peer, factor) for peer, factor in GEOMETRIC.items()),
        _generic(run.results),
        _errors(run.results),
        _host(run),
        _failures(run.results),
    ]
    return [bar for bar in bars if bar.judged]


def summary(bars: Sequence[Bar]) -> str:
    """The bars as text: the counts, then the misses."""
    lines = []
    for bar in bars:
        lines.append(f"{'holds ' if not bar.misses else 'MISSED'} {bar.held:4} of {bar.judged:<4} {bar.name}")
        lines += [f"                    {miss}" for miss in bar.misses]
    return "\n".join(lines)


def _single_limit(r: Result) -> float:
    if r.cell.rows <= LATENCY_ROWS:
        return r.light_us + LATENCY_ALLOWANCE
    return r.light_us / (0.95 if r.cell.bytes >= MIDDLE else 0.85)


def _eager_limit(r: Result) -> float:
    return r.light_us / (0.95 if r.cell.bytes >= LARGE else 0.90 if r.cell.bytes >= MIDDLE else 0.75)


def _against_light(results: Iterable[Result], name: str, limit: Callable[[Result], float]) -> Bar:
    bar = Bar(f"{name}: close to the speed of light")
    for r in results:
        us = r.us(name)
        if us is not None:
            bar.judge(r.cell.name, us, limit(r), " us")
    return bar


def _bits(results: Iterable[Result]) -> Bar:
    bar = Bar("ditnorm eager: bit-identical to the unfused expression, D a multiple of 4")
    for r in results:
        entry = r.entries.get(EAGER)
        if entry is not None and entry.bits_equal is not None and r.cell.width % 4 == 0:
            bar.judged += 1
            if not entry.bits_equal:
                bar.misses.append(f"{r.cell.name}: bits differ")
    return bar


def _against_peers(results: Iterable[Result], name: str, factor: Callable[[Result], float]) -> Bar:
    bar = Bar(f"{name}: against the fastest peer")
    for r in results:
        us, peer = r.us(name), r.fastest_peer()
        if us is not None and peer is not None:
            bar.judge(f"{r.cell.name} ({peer[0]} {peer[1]:.2f} us)", us, peer[1] * factor(r), " us")
    return bar


def geometric_mean(results: Iterable[Result], peer: str, time: Callable[[Result], float | None]) -> tuple[float, int]:
    """How many times faster ``time`` is than a peer over the anchors' cells with modulations per
    sample; and of how many cells.
    """
    logs = []
    for r in results:
        ours, theirs = time(r), r.us(peer)
        if r.cell.group == "anchors" and r.cell.per_sample and ours is not None and theirs is not None:
            logs.append(math.log(theirs / ours))
    return (math.exp(math.fsum(logs) / len(logs)), len(logs)) if logs else (math.nan, 0)


def _geometric(results: Sequence[Result], peer: str, factor: float) -> Bar:
    mean, cells = geometric_mean(results, peer, lambda r: r.us(SINGLE))
    light, _ = geometric_mean(results, peer, lambda r: r.light_us)
    name = f"ditnorm single: geometric mean over {cells} per-sample cells {mean:.2f} times faster than {peer}, at least {factor}"
    bar = Bar(f"{name}; the speed of light is {light:.2f} times")
    if cells:
        bar.judge("time in that of the peer", 1 / mean, 1 / factor, "")
    return bar


def _generic(results: Sequence[Result]) -> Bar:
    bar = Bar(f"generic kernel: within {GENERIC_FACTOR:g} times the next aligned width, by bytes")
    for odd in (r for r in results if not r.cell.aligned):
        for r in results:
            neighbour = r.cell.op == odd.cell.op and r.cell.rows == odd.cell.rows and r.cell.width == odd.cell.width + 1
            if not neighbour or not r.cell.per_sample or r.cell.dtype != odd.cell.dtype or r.cell.group != "anchors":
                continue
            for name in OURS:
                ours, theirs = odd.us(name), r.us(name)
                if ours is not None and theirs is not None and r.cell.modulation_dtype == odd.cell.modulation_dtype:
                    bar.judge(f"{odd.cell.name}, {name}", ours, GENERIC_FACTOR * theirs, " us")
    return bar


def _errors(results: Iterable[Result]) -> Bar:
    bar = Bar("ditnorm single: error against float64 that of one rounding; in fp32 not above the unfused expression's")
    for r in results:
        entry, unfused = r.entries.get(SINGLE), r.entries.get(UNFUSED)
        if entry is None or entry.excess is None or entry.error is None:
            continue
        if r.cell.dtype != "fp32":
            bar.judge(r.cell.name, entry.excess, ROUNDED_ONCE, " times")
        elif unfused is not None and unfused.error is not None:
            bar.judge(r.cell.name, entry.error * 1e9, unfused.error * 1e9, "e-9")
    return bar


def _host(run: Run[Cell]) -> Bar:
    bar = Bar("host time of a call against F.layer_norm")
    norm = run.host_seconds.get(LAYER_NORM)
    for op, factor in HOST_LIMITS.items():
        for name in OURS:
            seconds = run.host_seconds.get(f"{op}: {name}")
            if seconds is not None and norm is not None:
                bar.judge(f"{op}, {name}", seconds * 1e6, norm * factor * 1e6, " us")
    return bar


def _failures(results: Iterable[Result]) -> Bar:
    bar = Bar("ditnorm runs in every cell")
    for r in results:
        for name in OURS:
            entry = r.entries.get(name)
            bar.judged += 1
            if entry is None or entry.message is not None:
                bar.misses.append(f"{r.cell.name}, {name}: {entry.message if entry else 'missing'}")
    return bar
