"""The core of ``parity_*.py``: generates with and without ditnorm from one seed and compares, step
by step and frame by frame.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.execution import compile_blocks, forget_compiled, free, full_float32
from common.quantization import QUANTIZATIONS, quantize
from common.tables import environment, environment_line, text_table
from digits.families import FOLDER
from digits.untrained import UNTRAINED, checkpoint
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

import ditnorm
from ditnorm.ops.options import ROUNDINGS

from .generation import Generation, denoisers, generate
from .loading import CannotRun, pipeline_class
from .options import add_options, arguments, loaded, usage_errors
from .pictures import Row, comparison_row, save_moving, sheet
from .similarity import FrameDifference, frame_difference, relative_error

SINGLE_PSNR = 40.0  # dB that ``--rounding single`` must reach in bfloat16


@dataclass(frozen=True)
class Subject:
    """A family of pipelines."""

    title: str
    tiny: str
    """Its tiny pipeline: a folder under ``examples/digits``, or one of
    :mod:`digits.untrained`.
    """
    pipelines: tuple[str, ...]
    prompt: str


@dataclass(frozen=True)
class Difference:
    """One run against another from the same seed."""

    title: str
    identical: int
    """Steps after which the latents are equal bit for bit."""
    errors: tuple[float, ...]
    """Relative error of the latents after each step."""
    frames_identical: bool
    frames: FrameDifference

    @property
    def exact(self) -> bool:
        return self.identical == len(self.errors) and self.frames_identical

    def row(self) -> list[str]:
        frames = self.frames
        return [
            self.title,
            f"{self.identical} of {len(self.errors)}",
            f"{self.errors[-1]:.2e}" if self.errors[-1] else "0",
            _decibel(frames.psnr),
            _decibel(frames.worst_psnr) + ("" if frames.worst_psnr == math.inf else f" (frame {frames.worst_frame})"),
            f"{frames.ssim:.6f}",
            f"{frames.worst_ssim:.6f}",
            *([] if frames.lpips is None else [f"{frames.lpips:.2e}"]),
        ]

    def json(self) -> dict[str, Any]:
        return {
            "steps": len(self.errors),
            "steps_identical": self.identical,
            "relative_error_of_latents": self.errors,
            "frames_identical": self.frames_identical,
            **self.frames.json(),
        }


def compare(title: str, a: Generation, b: Generation) -> Difference:
    """``a`` measured against ``b``."""
    pairs = list(zip(a.latents, b.latents, strict=True))
    return Difference(
        title,
        sum(torch.equal(x, y) for x, y in pairs),
        tuple(relative_error(x, y) for x, y in pairs),
        torch.equal(a.frames, b.frames),
        frame_difference(a.frames.flatten(0, 1), b.frames.flatten(0, 1)),
    )


def _decibel(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def parse(subject: Subject, argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=f"Generate with a {subject.title} pipeline with and without ditnorm, from the same seed, and compare. "
        "Exit status: 0 parity holds, 1 it doesn't, 2 it couldn't be run."
    )
    tiny = None if subject.tiny in UNTRAINED else FOLDER / subject.tiny
    add_options(parser, tiny=tiny, pipelines=f"one of {', '.join(subject.pipelines)}", out="parity-output")
    parser.add_argument("--rounding", choices=ROUNDINGS, default="eager", help="ditnorm's (default: %(default)s)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="torchao's, of the linear layers of the blocks")
    parser.add_argument("--compile", action="store_true", help="compare patched + compiled with compiled, too")
    return parser, parser.parse_args(argv)


class Session:
    """Loads the pipeline and runs it, unpatched, patched, compiled and in float32."""

    def __init__(self, subject: Subject, options: argparse.Namespace, device: torch.device, on_step: Callable[[], object]) -> None:
        self.subject, self.options, self.device, self.on_step = subject, options, device, on_step
        self.pipe = loaded(options, device)

    def quantize(self) -> None:
        for model in denoisers(self.pipe):
            quantize(model, self.options.quantization)

    def generate(self, like: Generation | None = None) -> Generation:
        given = arguments(self.options, self.pipe, self.subject.prompt)
        return generate(self.pipe, given, self.options.steps, noise=None if like is None else like.noise, on_step=self.on_step)

    def compiled(self) -> Generation:
        for model in denoisers(self.pipe):
            compile_blocks(model)
        try:
            return self.generate()
        finally:
            for model in denoisers(self.pipe):
                forget_compiled(model)

    def float32(self, like: Generation) -> Generation:
        """The same weights in float32, from the noise that ``like`` drew."""
        del self.pipe
        free()
        self.pipe = loaded(self.options, self.device, torch.float32)
        with full_float32():
            return self.generate(like)


@dataclass(frozen=True)
class Result:
    """Everything that was compared; ``notes`` say what couldn't be."""

    eager: Generation
    patched: Generation
    parity: Difference
    yardstick: Difference | None
    others: tuple[Difference, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[Difference]:
        return [self.parity, *([self.yardstick] if self.yardstick else []), *self.others]


def run(subject: Subject, options: argparse.Namespace, device: torch.device, progress: tqdm) -> Result:
    """Makes all generations and compares them."""
    notes: list[str] = []
    others: list[Difference] = []
    yardstick: Difference | None = None
    session = Session(subject, options, device, progress.update)

    plain: Generation | None = None
    if options.quantization is not None:
        progress.set_description("not quantised")
        plain = session.generate()
        session.quantize()
    progress.set_description("unpatched")
    eager = session.generate()
    progress.set_description("patched")
    ditnorm.patch_pipeline(session.pipe, rounding=options.rounding)
    if options.precompute_modulation:
        ditnorm.precompute_modulation(session.pipe)
    patched = session.generate()
    parity = compare("patched : unpatched", patched, eager)
    if plain is not None:
        others += [compare(f"{title} : {options.dtype}", run, plain) for title, run in (("unpatched", eager), ("patched", patched))]
    both: Generation | None = None
    try:
        if options.compile:
            progress.set_description("patched, compiled")
            both = session.compiled()
        ditnorm.unpatch_pipeline(session.pipe)
        progress.set_description("unpatched, compiled")
        compiled = session.compiled()
        yardstick = compare("yardstick, compiled : unpatched", compiled, eager)
        if both is not None:
            others.append(compare("patched + compiled : compiled", both, compiled))
    except Exception as error:
        # No compiler here, or what it can't compile: parity doesn't depend on it.
        if isinstance(error, torch.OutOfMemoryError):
            raise
        notes.append(f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    try:
        progress.set_description("unpatched, float32")
        exact = session.float32(eager)
        others += [compare("unpatched : float32", eager, exact), compare("patched : float32", patched, exact)]
    except torch.OutOfMemoryError:
        notes.append("float32: too little GPU memory; --offload needs less")
    return Result(eager, patched, parity, yardstick, tuple(others), tuple(notes))


def holds(result: Result, rounding: str, dtype: str) -> tuple[bool, str]:
    """Whether parity holds, and the rule in words."""
    if rounding == "eager":
        return result.parity.exact, "every latent and pixel equal bit for bit"
    least = SINGLE_PSNR if dtype == "bfloat16" else 0.0
    if result.yardstick is not None:
        least = max(least, min(result.yardstick.frames.worst_psnr, SINGLE_PSNR if result.yardstick.exact else math.inf))
    return result.parity.frames.worst_psnr >= least, f"PSNR of the worst frame at least {_decibel(least)}"


def picture(result: Result, frame: int, title: str) -> Image.Image:
    """Unpatched, patched and difference of one frame; a batch is tiled."""
    before, after = result.eager.frames[:, frame], result.patched.frames[:, frame]
    rows: list[Row] = [comparison_row(title, before, after, columns=min(len(before), 5))]
    return sheet(rows)


def write(result: Result, folder: Path, name: str, title: str, report: dict[str, Any]) -> Path:
    """Writes the JSON and the picture or video; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    images = [picture(result, frame, title) for frame in range(result.eager.frames.shape[1])]
    path = folder / f"{name}.png"
    if len(images) == 1:
        images[0].save(path, optimize=True)
        return path
    return save_moving(images, path)


def main(subject: Subject, argv: Sequence[str] | None = None) -> int:
    """Runs one family's script; returns the exit status."""
    parser, options = parse(subject, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = options.model or "random weights"
    with ExitStack() as stack, usage_errors(parser):
        if options.model is None:
            options.model = stack.enter_context(checkpoint(subject.tiny))
        if options.quantization is not None and options.dtype != "bfloat16":
            raise CannotRun("--quantization: of models in bfloat16")
        name = pipeline_class(options.model, options.image is not None).__name__
        if name not in subject.pipelines:
            raise CannotRun(f"{options.model} is a {name}; this script takes {', '.join(subject.pipelines)}")
        with tqdm(total=(4 + options.compile + (options.quantization is not None)) * options.steps, unit="step") as progress:
            result = run(subject, options, device, progress)

    good, rule = holds(result, options.rounding, options.dtype)
    script = f"scripts/parity_{subject.tiny.replace('-', '_')}.py"
    report = {
        "command": shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)]),
        "environment": environment(device),
        "pipeline": name,
        "model": shown,
        "rounding": options.rounding,
        "precompute_modulation": options.precompute_modulation,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "parity": good,
        "rule": rule,
        "comparisons": {difference.title: difference.json() for difference in result.rows()},
        "notes": result.notes,
    }
    path = write(result, options.out, subject.tiny, f"{name}, {options.dtype}", report)
    header = ["a : b", "steps equal", "latents' error", "PSNR", "worst PSNR", "SSIM", "worst SSIM"]
    header += [] if result.parity.frames.lpips is None else ["LPIPS"]
    precomputed = ", modulations precomputed" * options.precompute_modulation
    kind = options.quantization or options.dtype
    print(f"\n{name}, {shown}, {kind}, rounding {options.rounding}{precomputed}\n{environment_line(device)}\n")
    print(text_table([header, *(difference.row() for difference in result.rows())]))
    print("\n".join(["", *(f"not compared: {note}" for note in result.notes)]))
    print(f"parity {'holds' if good else 'DOES NOT HOLD'}: {rule}\nside by side: {path}")
    return int(not good)
