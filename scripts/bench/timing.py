"""GPU times: a CUDA graph for each contestant, replayed in rotating order, each call on other
tensors than the last caches hold.
"""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .contestants import Call

# Of GPU work in a graph: its start and the two events are then below one per cent.
GRAPH_SECONDS = 1.5e-3
ASSUMED_BANDWIDTH = 3.5e12
MOST_REPLAYS, LEAST_REPLAYS, REPLAY_SECONDS = 20, 7, 0.1
SLEEP_CYCLES_PER_SECOND = 2e9
MARGIN = 1.5


@dataclass
class Timing:
    """Seconds of one call: median and quartiles over the replays."""

    median: float
    low: float
    high: float


def input_sets(input_bytes: int) -> int:
    """How many sets of inputs exceed the L2 cache twice; at least two."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-2 * l2 // input_bytes))


def calls_in_graph(sets: int, moved_bytes: int) -> int:
    """A multiple of the number of input sets that keeps the GPU busy long enough to be timed."""
    calls = GRAPH_SECONDS / (moved_bytes / ASSUMED_BANDWIDTH)
    return sets * max(1, round(calls / sets))


@dataclass
class Recording:
    """A captured graph of so many calls."""

    graph: torch.cuda.CUDAGraph
    calls: int
    bound: Sequence[Call]
    """The calls that were captured; they keep alive what the graph reads."""


def record(bound: Sequence[Call], calls: int) -> Recording:
    """Captures ``calls`` calls, going round the bound ones. Two calls before it leave nothing to
    compile or to load lazily.
    """
    # Alive while others are captured, so that outputs rotate as the inputs do.
    results: deque[Any] = deque(maxlen=len(bound))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            bound[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            results.append(bound[i % len(bound)]())
    return Recording(graph, calls, bound)


def measure(recordings: Mapping[str, Recording], replays: int | None = None) -> dict[str, Timing]:
    """Replays every graph in turn, beginning with another one each round."""
    host_seconds, gpu_seconds = _first_replays(recordings)
    if replays is None:
        replays = min(MOST_REPLAYS, max(LEAST_REPLAYS, int(REPLAY_SECONDS / max(gpu_seconds.values()))))
    samples: dict[str, list[float]] = {name: [] for name in recordings}
    names = list(recordings)
    for turn in range(replays):
        events = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # The GPU sleeps while the host submits the graph, so that the events enclose nothing
            # but the graph's work.
            torch.cuda._sleep(int(MARGIN * host_seconds[name] * SLEEP_CYCLES_PER_SECOND))
            start.record()
            recordings[name].graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) * 1e-3 / recordings[name].calls)
    return {name: _summary(times) for name, times in samples.items()}


def _first_replays(recordings: Mapping[str, Recording]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that submitting each graph takes the host, and that it takes altogether; the first
    replay also uploads it.
    """
    host, total = {}, {}
    for name, recording in recordings.items():
        recording.graph.replay()
        torch.cuda.synchronize()
        start = time.perf_counter()
        recording.graph.replay()
        host[name] = time.perf_counter() - start + 20e-6
        torch.cuda.synchronize()
        total[name] = time.perf_counter() - start
    return host, total


def _summary(times: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high)


def copy_bandwidth(gigabytes: int = 4, copies: int = 11) -> float:
    """Bytes a second, read plus written, of a large device-to-device copy: the median. Not in a
    graph, where copy engines do it.
    """
    source = torch.randint(0, 1 << 30, (gigabytes << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(copies):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() * source.itemsize / statistics.median(seconds)
