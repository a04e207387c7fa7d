"""The benchmark of QK normalisation with rotary embedding: ditnorm, eager PyTorch, torch.compile, other libraries, plain copies.

    python scripts/bench_rope.py                     everything, 4 minutes on an H100 with every other library
    python scripts/bench_rope.py --cells Wan --quick  the cells whose names contain this, without max-autotune

Method: as scripts/bench_ops.py. "copy" is the share of a large device-to-device copy's bandwidth, "light" that of the fastest plain
streaming kernel that moves the same rows (without the rotary tables, which are read besides). Other libraries are measured where they
can be imported and serve the cell, and are right: bench/rope_peers.py tells which kernels, and how they are called. Needs a GPU, nvcc, and
pip install 'ditnorm[bench]'.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout's ditnorm, installed or not

from bench import environment, rope_peers
from bench.cells import DTYPES, EPS
from bench.host import CALLS, rotate
from bench.light import Light
from bench.timing import Call, Recording, calls_in_graph, copy_bandwidth, input_sets, measure, record
from common.tables import text_table

from ditnorm import functional, kernels
from ditnorm.ops.table import OPS

SINGLE, EAGER, UNFUSED, COMPILED, AUTOTUNED = "ditnorm single", "ditnorm eager", "eager", "torch.compile", "max-autotune"


@dataclass(frozen=True)
class RopeCell:
    """One call, B = 1. ``encoder``: the tokens of a second stream, with its values joined too; 0: query and key alone."""

    name: str
    tokens: int
    heads: int
    head_dim: int = 128
    encoder: int = 0
    rotary: str | None = "complex"
    rotated: int | None = None
    across: bool = False
    dtype: str = "bf16"

    @property
    def norm(self) -> str:
        return "rms" if self.across else "diffusers_rms"

    @property
    def row_bytes(self) -> int:
        """Of all rows that are read; as many are written."""
        rows = 3 * (self.tokens + self.encoder) if self.encoder else 2 * self.tokens
        return rows * self.heads * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        rotated = 0 if self.rotary is None else (self.tokens if self.rotated is None else self.rotated)
        if self.rotary == "complex":
            rotated += self.encoder
        # Wan's tables hold each value twice, and lines are read whole.
        return 2 * self.row_bytes + rotated * self.head_dim * 4 * (1 if self.rotary == "complex" else 2)

    def inputs(self) -> dict[str, Any]:
        """Random arguments of ``qk_norm_rope`` or, with an encoder, ``joint_qk_norm_rope``."""
        dtype, width = DTYPES[self.dtype], self.heads * self.head_dim

        def stream(prefix: str, tokens: int, rotary: Any) -> dict[str, Any]:
            names = ("query", "key", "value") if self.encoder else ("query", "key")
            made: dict[str, Any] = {f"{prefix}{name}": torch.randn(1, tokens, width, dtype=dtype, device="cuda") for name in names}
            weight = width if self.across else self.head_dim
            made |= {f"{prefix}{name}_weight": 1 + 0.3 * torch.randn(weight, device="cuda").to(dtype) for name in ("query", "key")}
            return made | {f"{prefix}rotary": rotary}

        made = stream("", self.tokens, self._tables(self.tokens if self.rotated is None else self.rotated))
        if self.encoder:
            made |= stream("encoder_", self.encoder, self._tables(self.encoder) if self.rotary == "complex" else None)
        return made

    def _tables(self, tokens: int) -> Any:
        angles = torch.randn(tokens, self.head_dim // 2, device="cuda")
        if self.rotary == "complex":
            return torch.polar(torch.ones_like(angles), angles)
        if self.rotary is None:
            return None
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (angles.cos(), angles.sin()))
        if self.rotary == "per_element":
            return cos, sin
        return cos[None, :, None, 0::2], sin[None, :, None, 1::2]


CELLS = (
    RopeCell("Qwen-Image 1024x1024, joint", 4096, 24, encoder=128),
    RopeCell("Qwen-Image 512x512, joint", 1024, 24, encoder=128),
    RopeCell("HunyuanVideo 848x480x65, dual", 27030, 24, encoder=256, rotary="per_element"),
    RopeCell("HunyuanVideo 848x480x65, single", 27286, 24, rotary="per_element", rotated=27030),
    RopeCell("Wan2.1-1.3B 480p, self", 32760, 12, rotary="per_pair", across=True),
    RopeCell("Wan2.2-TI2V-5B 704p, self", 27280, 24, rotary="per_pair", across=True),
    RopeCell("Wan2.2-A14B 720p, self", 75600, 40, rotary="per_pair", across=True),
    RopeCell("128 tokens", 128, 24),
    RopeCell("1024 tokens", 1024, 24),
    RopeCell("heads of 64", 27030, 48, 64),
    RopeCell("heads of 96", 27030, 32, 96),
    RopeCell("heads of 256", 27030, 12, 256),
    RopeCell("heads of 40", 27030, 75, 40),
    RopeCell("fp16", 27030, 24, dtype="fp16"),
    RopeCell("fp32", 27030, 24, dtype="fp32"),
    RopeCell("across heads, fp32", 32760, 12, rotary="per_pair", across=True, dtype="fp32"),
    RopeCell("norm alone", 27030, 24, rotary=None),
)


def ours(cell: RopeCell, rounding: str, inputs: Mapping[str, Any]) -> Call:
    function: Callable[..., Any] = functional.joint_qk_norm_rope if cell.encoder else functional.qk_norm_rope
    return partial(function, **inputs, head_dim=cell.head_dim, norm=cell.norm, eps=EPS, rounding=rounding)


def unfused(cell: RopeCell) -> Callable[..., Any]:
    return OPS["joint_qk_norm_rope" if cell.encoder else "qk_norm_rope"].expression


def expression(cell: RopeCell, function: Callable[..., Any], inputs: Mapping[str, Any], rounding: str = "eager") -> Call:
    """The unfused expression of diffusers' processors on the same arguments."""
    flat: list[Any] = []
    for name, value in inputs.items():
        flat += list(value) if isinstance(value, tuple) else [value, None] if name.endswith("rotary") else [value]
    return partial(function, *flat, cell.head_dim, cell.norm, EPS, *((False,) if cell.encoder else ()), rounding)


def contestants(cell: RopeCell, compiled: bool, autotuned: bool) -> dict[str, Callable[[Mapping[str, Any]], Call]]:
    function = unfused(cell)
    found: dict[str, Callable[[Mapping[str, Any]], Call]] = {
        SINGLE: partial(ours, cell, "single"),
        EAGER: partial(ours, cell, "eager"),
        UNFUSED: partial(expression, cell, function),
    }
    if compiled:
        found[COMPILED] = partial(expression, cell, torch.compile(function, fullgraph=True, dynamic=False))
    if autotuned:
        mode = "max-autotune-no-cudagraphs"
        found[AUTOTUNED] = partial(expression, cell, torch.compile(function, fullgraph=True, dynamic=False, mode=mode))
    return found


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def run_cell(cell: RopeCell, light: Light, compiled: bool, autotuned: bool) -> dict[str, Any]:
    """Microseconds by contestant, the speed of light, and whether ``"eager"`` has the bits of the unfused expression."""
    torch.compiler.reset()
    first = cell.inputs()
    sets = input_sets(cell.bytes // 2)
    calls = calls_in_graph(sets, cell.bytes)
    inputs = [first, *(cell.inputs() for _ in range(sets - 1))]
    recordings: dict[str, Recording] = {}
    failed: dict[str, str] = {}
    results: dict[str, Sequence[Tensor]] = {}
    for name, bind in contestants(cell, compiled, autotuned).items():
        try:
            bound = [bind(one) for one in inputs]
            results[name] = bound[0]()
            recordings[name] = record(bound, calls)
        except Exception as error:
            failed[name] = brief(error)
    kept: list[Any] = []  # what the peers' graphs read besides the inputs
    for peer in rope_peers.found().available:
        try:
            peer_bound: list[Call] = [call for one in inputs if (call := peer.bind(cell, one)) is not None]
            if peer_bound:
                rope_peers.check(peer_bound[0](), expression(cell, unfused(cell), first, "single")())
                torch.cuda.empty_cache()
                recordings[peer.name] = record(peer_bound, calls)
                kept.append(peer_bound)
        except Exception as error:
            failed[peer.name] = brief(error)
    streams = (2, 2, cell.row_bytes // 2 // 16 * 16)
    plain = {name: record(bound, calls) for name, bound in light.finalists(streams, sets, calls).items()}
    timings = measure(recordings | plain)
    pairs = list(zip(results[EAGER], results[UNFUSED], strict=True)) if {EAGER, UNFUSED} <= results.keys() else []
    return {
        **asdict(cell),
        "bytes": cell.bytes,
        "light_us": min(timings[name].median for name in plain) * 1e6,
        "us": {name: timings[name].median * 1e6 for name in recordings},
        "failed": failed,
        "bits_equal": bool(pairs) and all(torch.equal(a, b) for a, b in pairs),
    }


def host_microseconds() -> dict[str, float]:
    """Host time of one eager call at 128 tokens, GPU kept behind."""
    cell = RopeCell("", 128, 24, encoder=128)
    inputs = cell.inputs()
    alone = RopeCell("", 128, 24, rotary="per_pair", across=True)
    calls = {
        "joint_qk_norm_rope: ditnorm eager": ours(cell, "eager", inputs),
        "joint_qk_norm_rope: eager": expression(cell, OPS["joint_qk_norm_rope"].expression, inputs),
        "qk_norm_rope: ditnorm eager": ours(alone, "eager", alone_inputs := alone.inputs()),
        "qk_norm_rope: eager": expression(alone, OPS["qk_norm_rope"].expression, alone_inputs),
    }
    return {name: seconds * 1e6 for name, seconds in rotate(calls).items()}


def table(results: Sequence[Mapping[str, Any]], copy_bytes_per_second: float) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["us"]))
    rows = [["cell", "MB", "light", *names, "eager: copy", "light", "/ compiled", "bits"]]
    for r in results:
        us = r["us"]
        peers = [us[name] for name in (COMPILED, AUTOTUNED) if name in us]
        mine = us.get(EAGER, float("nan"))
        share = f"{r['bytes'] / (mine * 1e-6) / copy_bytes_per_second:.0%}"
        against = f"{mine / min(peers):.2f}" if peers else "-"
        times = [f"{us[name]:.2f}" if name in us else "-" for name in names]
        bits = "equal" if r["bits_equal"] else "DIFFER"
        rows.append(
            [r["name"], f"{r['bytes'] / 1e6:.1f}", f"{r['light_us']:.2f}", *times, share, f"{r['light_us'] / mine:.0%}", against, bits]
        )
    return text_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=[""], metavar="PATTERN", help="only cells whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="no max-autotune")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="for rope.json (%(default)s)")
    options = parser.parse_args(argv)
    cells = [cell for cell in CELLS if any(pattern in cell.name for pattern in options.cells)]
    if not torch.cuda.is_available() or not cells:
        why = "PyTorch sees no CUDA GPU here" if cells else f"no cell's name contains {' or '.join(options.cells)}"
        print(f"bench_rope: {why}", file=sys.stderr)
        return 2
    with torch.no_grad():
        torch.manual_seed(0)
        light, copy = Light(), copy_bandwidth()
        found = environment.describe(rope_peers.found())
        print(f"{environment.text(found)}\ncopy bandwidth {copy / 1e12:.3f} TB/s\n")
        host = host_microseconds()
        if kernels.unavailable is not None:
            print(f"bench_rope: ditnorm's CUDA kernels are unavailable: {kernels.unavailable}", file=sys.stderr)
            return 2
        options.out.mkdir(parents=True, exist_ok=True)
        results: list[dict[str, Any]] = []
        document = {"environment": found, "copy_bytes_per_second": copy, "host_us": host, "cells": results}
        for cell in (progress := tqdm(cells, unit="cell")):
            progress.set_description(cell.name)
            results.append(run_cell(cell, light, not options.no_compile, not (options.no_compile or options.quick)))
            tqdm.write(f"{table(results[-1:], copy)}\n")
            (options.out / "rope.json").write_text(json.dumps(document, indent=1) + "\n")  # a run cut short keeps what it has
            torch.cuda.empty_cache()
    print(f"\n{table(results, copy)}\n\nhost time of a call at 128 tokens, microseconds, {CALLS} calls, GPU kept behind")
    print(text_table([[name, f"{us:.1f}"] for name, us in host.items()]))
    for result in results:
        for name, message in result["failed"].items():
            print(f"{result['name']}: {name}: {message}")
    print(f"\n{options.out / 'rope.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
