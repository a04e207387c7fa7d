"""Generates with three tiny pipelines, with and without ditnorm, and compares the results: a table, a report and a picture.

    python scripts/demo.py [--steps N] [--out DIR]

Runs on the GPU if PyTorch sees one. The exit status is 1 if any latent or pixel differs.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from demo_pipelines import PIPELINES, TinyPipeline
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm  # type: ignore[import-untyped]

import ditnorm
from ditnorm import kernels
from ditnorm.report import Report

SEED = 0
AMPLIFICATION = 64
MARGIN, LABEL = 12, 20  # pixels


@dataclass(frozen=True)
class Generation:
    """What one call of a pipeline made, and the ops of one forward of its transformer; tensors on the CPU."""

    latents: Tensor
    """After the last step."""
    frames: Tensor
    """Decoded, ``[F, 3, H, W]``, 0 to 1."""
    seconds: float
    ops: int


@dataclass(frozen=True)
class Comparison:
    """One pipeline without and with ditnorm."""

    name: str
    before: Generation
    after: Generation
    report: Report

    @property
    def difference(self) -> float:
        """The largest one over latents and pixels: 0 only if all are equal, NaN where one is NaN."""
        pairs = [(self.before.latents, self.after.latents), (self.before.frames, self.after.frames)]
        if all(torch.equal(a, b) for a, b in pairs):
            return 0.0
        return torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max().item()

    def row(self) -> list[str]:
        blocks = [f"{t.fused} of {t.blocks}" for t in self.report.transformers]
        ops = f"{self.before.ops} -> {self.after.ops}"
        seconds = f"{self.before.seconds:.2f} -> {self.after.seconds:.2f}"
        return [self.name, ", ".join(blocks), ops, f"{self.difference:.3g}", seconds]


class OpCounter(TorchDispatchMode):
    """Counts the operators that compute something: not views, not the allocation of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not views and func._schema.name not in ("aten::_unsafe_view", "aten::empty")
        return func(*args, **(kwargs or {}))


def call(
    pipe: DiffusionPipeline, tiny: TinyPipeline, steps: int, on_step: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor, float]:
    """Generates from the one seed: latents, frames ``[F, 3, H, W]`` and seconds."""
    latents: list[Tensor] = []

    def step_end(_pipe: DiffusionPipeline, _step: int, _timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [tensors["latents"]]
        on_step()
        return {}

    arguments = {name: value.to(pipe.device) if isinstance(value, Tensor) else value for name, value in tiny.arguments().items()}
    start = time.perf_counter()
    (frames,) = pipe(
        **arguments,
        **tiny.size,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=step_end,
        output_type="pt",
        return_dict=False,
    )
    frames = frames.cpu()
    return latents[0].cpu(), frames.reshape(-1, *frames.shape[-3:]), time.perf_counter() - start


def first_forward(pipe: DiffusionPipeline, tiny: TinyPipeline) -> dict[str, Any]:
    """The arguments that the pipeline calls its transformer with. It is also the warm-up."""
    calls: list[dict[str, Any]] = []

    def capture(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    with pipe.transformer.register_forward_pre_hook(capture, with_kwargs=True):
        call(pipe, tiny, steps=1)
    return calls[0]


@torch.no_grad()
def count_ops(transformer: nn.Module, arguments: dict[str, Any]) -> int:
    with OpCounter() as counter:
        transformer(**arguments)
    return counter.count


def compare(tiny: TinyPipeline, device: torch.device, steps: int, progress: tqdm) -> Comparison:
    """Builds the pipeline and generates without and with ditnorm."""
    torch.manual_seed(SEED)
    pipe = tiny.build().to(device)
    pipe.set_progress_bar_config(disable=True)
    name = type(pipe).__name__
    arguments = first_forward(pipe, tiny)

    def generate(label: str) -> Generation:
        progress.set_description(f"{name}, {label}")
        ops = count_ops(pipe.transformer, arguments)
        return Generation(*call(pipe, tiny, steps, progress.update), ops)

    before = generate("unpatched")
    ditnorm.patch_pipeline(pipe)
    after = generate("patched")
    return Comparison(name, before, after, ditnorm.report(pipe))


def table(comparisons: Sequence[Comparison]) -> str:
    header = ["pipeline", "blocks fused", "ops per forward", "largest difference", "seconds"]
    rows = [header, *(comparison.row() for comparison in comparisons)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def environment(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}"


def notes(device: torch.device) -> str:
    """How to read the table."""
    if device.type == "cuda" and kernels.unavailable is None:
        seconds = "Models as tiny as these mostly wait for kernels to be launched: it says little about real ones."
    else:
        seconds = "Without the CUDA kernels, ditnorm runs the same PyTorch operations: nothing is faster here."
    return (
        "a -> b: without and with ditnorm.\n"
        "ops per forward: operators called in one forward of the transformer, without views; a fused op counts as one.\n"
        "largest difference: over all latents and pixels, from the same seed; 0: all are equal.\n"
        f"seconds: one generation, VAE included.\n{seconds}"
    )


def strip(frames: Tensor) -> Image.Image:
    """The picture, or the first, middle and last frame of a video, side by side."""
    chosen = sorted({0, len(frames) // 2, len(frames) - 1})
    pixels = torch.cat([frames[i] for i in chosen], dim=-1).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def picture(comparisons: Sequence[Comparison]) -> Image.Image:
    """A row for each pipeline: unpatched, patched, amplified difference."""
    rows = [
        (c.name, [strip(c.before.frames), strip(c.after.frames), strip((c.before.frames - c.after.frames).abs() * AMPLIFICATION)])
        for c in comparisons
    ]
    width = MARGIN + sum(cell.width + MARGIN for cell in rows[0][1])
    height = MARGIN + sum(LABEL + cells[0].height + MARGIN for _, cells in rows)
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    y = MARGIN
    for name, cells in rows:
        labels = (f"{name}, unpatched", "patched", f"difference x {AMPLIFICATION} (black: none)")
        x = MARGIN
        for label, cell in zip(labels, cells, strict=True):
            draw.text((x, y), label, fill="black", font=font)
            canvas.paste(cell, (x, y + LABEL))
            x += cell.width + MARGIN
        y += LABEL + cells[0].height + MARGIN
    return canvas


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if anything differs."""
    parser = argparse.ArgumentParser(description="Generate with three tiny pipelines, with and without ditnorm, and compare.")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="for the picture (default: %(default)s)")
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=2 * options.steps * len(PIPELINES), unit="step") as progress:
        comparisons = [compare(tiny, device, options.steps, progress) for tiny in PIPELINES]
        progress.set_description("done")

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "demo.png"
    picture(comparisons).save(path, optimize=True)
    print(f"\n{environment(device)}\n\n{table(comparisons)}\n\n{notes(device)}\n\n{comparisons[-1].report}\n\nside by side: {path}")
    return int(any(comparison.difference != 0 for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
