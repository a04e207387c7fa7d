"""Draws handwritten digits with three tiny trained pipelines, with and without ditnorm, and
compares: reports, a table, pictures.

    python scripts/demo.py [--steps N] [--out DIR]

Runs on the GPU if PyTorch sees one. The exit status is 1 if any latent or pixel differs.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common.tables import environment_line, text_table
from diffusers import DiffusionPipeline
from digits import dataset
from digits.families import FAMILIES, STEPS, Family
from PIL import Image
from pipelines import loading
from pipelines.generation import Generation, generate
from pipelines.pictures import comparison_row, save_animation, sheet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm  # type: ignore[import-untyped]

import ditnorm
from ditnorm import kernels
from ditnorm.patching.report import Report

COLUMNS = 5
ROUNDS = 5  # of timing
KEY_FRAME = 2 / 3  # of a video: the third of four latent frames, which decoding doesn't interpolate


@dataclass(frozen=True)
class Comparison:
    """One pipeline without and with ditnorm; ``ops``: of one forward of its transformer."""

    name: str
    before: Generation
    after: Generation
    ops_before: int
    ops_after: int
    report: Report
    seconds: tuple[float, float] | None
    """Of one generation, before and after; None where nothing gets faster."""

    @property
    def difference(self) -> float:
        """The largest one over the latents of all steps and pixels: 0 only if all are equal, NaN
        where one is NaN.
        """
        pairs = [*zip(self.before.latents, self.after.latents, strict=True), (self.before.frames, self.after.frames)]
        if all(torch.equal(a, b) for a, b in pairs):
            return 0.0
        return torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max().item()

    def row(self) -> list[str]:
        blocks = [f"{t.fused} of {t.blocks}" for t in self.report.transformers]
        ops = f"{self.ops_before} -> {self.ops_after}"
        read = " -> ".join(f"{_read(generation)} of {dataset.CLASSES}" for generation in (self.before, self.after))
        row = [self.name, ", ".join(blocks), ops, f"{self.difference:.3g}", read]
        return row if self.seconds is None else [*row, " -> ".join(f"{seconds:.2f}" for seconds in self.seconds)]


class OpCounter(TorchDispatchMode):
    """Counts the operators that compute something: not views, not the allocation of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not views and func._schema.name not in ("aten::_unsafe_view", "aten::empty")
        return func(*args, **(kwargs or {}))


def _read(generation: Generation) -> int:
    """How many of the ten digits the classifier recognises, in the first frame and in the last."""
    return int((dataset.read_frames(generation.frames) == torch.arange(dataset.CLASSES)[:, None]).all(1).sum())


def first_forward(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the pipeline calls its transformer with."""
    calls: list[dict[str, Any]] = []

    def capture(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    with pipe.transformer.register_forward_pre_hook(capture, with_kwargs=True):
        pipe(**arguments, num_inference_steps=1, output_type="latent")
    return calls[0]


@torch.no_grad()
def count_ops(transformer: nn.Module, arguments: dict[str, Any]) -> int:
    with OpCounter() as counter:
        transformer(**arguments)
    return counter.count


def compare(family: Family, device: torch.device, steps: int, progress: tqdm) -> Comparison:
    """Loads the pipeline and draws the ten digits without and with ditnorm."""
    pipe = loading.load(str(family.folder), torch.bfloat16).to(device)
    arguments = family.call_arguments(range(dataset.CLASSES), pipe, family.folder)
    forward = first_forward(pipe, arguments)

    def run(label: str) -> tuple[Generation, int]:
        progress.set_description(f"{family.pipeline}, {label}")
        return generate(pipe, arguments, steps, on_step=progress.update), count_ops(pipe.transformer, forward)

    before, ops_before = run("unpatched")
    ditnorm.patch_pipeline(pipe)
    after, ops_after = run("patched")
    report = ditnorm.report(pipe)
    seconds = None
    if kernels.serves(torch.empty(0, device=device)):
        progress.set_description(f"{family.pipeline}, timed")
        seconds = in_turn(pipe, arguments, steps)
    return Comparison(family.pipeline, before, after, ops_before, ops_after, report, seconds)


def in_turn(pipe: DiffusionPipeline, arguments: dict[str, Any], steps: int) -> tuple[float, float]:
    """The median seconds of a generation without and with ditnorm, which take turns. Both are
    warm.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for patched in seconds:
            (ditnorm.patch_pipeline if patched else ditnorm.unpatch_pipeline)(pipe)
            seconds[patched].append(generate(pipe, arguments, steps).seconds)
    return median(seconds[False]), median(seconds[True])


def table(comparisons: Sequence[Comparison]) -> str:
    header = ["pipeline", "blocks fused", "ops per forward", "largest difference", "digits read", "seconds"]
    rows = [comparison.row() for comparison in comparisons]
    return text_table([header[: len(rows[0])], *rows])


def notes(comparisons: Sequence[Comparison]) -> str:
    """How to read the table."""
    if comparisons[0].seconds is None:
        seconds = "No seconds: without the CUDA kernels ditnorm runs the same PyTorch operations, and nothing is faster."
    else:
        seconds = (
            f"seconds: of one generation, VAE included, the median of {ROUNDS} without and {ROUNDS} with ditnorm in turn.\n"
            "Models as tiny as these mostly wait for kernels to be launched: it says little about real ones."
        )
    return (
        "a -> b: without and with ditnorm.\n"
        "ops per forward: operators called in one forward of the transformer, without views; a fused op counts as one.\n"
        "largest difference: over the latents of every step and all pixels, from the same seed; 0: all are equal.\n"
        "digits read: correctly, by a classifier of real handwritten digits.\n"
        f"{seconds}"
    )


def picture(comparisons: Sequence[Comparison], moment: float) -> Image.Image:
    """A row for each pipeline: unpatched, patched, amplified difference; of videos the frame at
    ``moment``, 0 to 1.
    """

    def row(c: Comparison) -> list[tuple[str, Image.Image]]:
        index = round(moment * (c.before.frames.shape[1] - 1))
        return comparison_row(c.name, c.before.frames[:, index], c.after.frames[:, index], COLUMNS)

    return sheet([row(c) for c in comparisons])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if anything differs."""
    parser = argparse.ArgumentParser(description="Draw digits with three tiny trained pipelines, with and without ditnorm, and compare.")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="for the pictures (default: %(default)s)")
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=2 * options.steps * len(FAMILIES), unit="step") as progress:
        comparisons = [compare(family, device, options.steps, progress) for family in FAMILIES.values()]
        progress.set_description("done")

    options.out.mkdir(parents=True, exist_ok=True)
    still, moving = options.out / "demo.png", options.out / "demo.gif"
    picture(comparisons, KEY_FRAME).save(still, optimize=True)
    save_animation([picture(comparisons, i / (dataset.FRAMES - 1)) for i in range(dataset.FRAMES)], moving)
    for comparison in comparisons:
        print(f"\n{comparison.report}")
    print(f"\n{environment_line(device)}\n\n{table(comparisons)}\n\n{notes(comparisons)}\n\nside by side: {still}, {moving}")
    return int(any(comparison.difference != 0 for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
