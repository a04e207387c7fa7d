"""What the commands about whole pipelines share: their options, and what these make of a
checkpoint.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from digits.families import STEPS

from .loading import CannotRun, call_arguments, load, place

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_options(parser: argparse.ArgumentParser, *, tiny: Path | None, pipelines: str, out: str) -> None:
    """``tiny``: the folder of the checkpoint that is used where none is named; None: there is none.
    ``pipelines``: of which kind one may be.
    """
    default = "a tiny one with random weights" if tiny is None else f"the tiny {tiny.name}"
    parser.add_argument(
        "--model",
        default=None if tiny is None else str(tiny),
        help=f"folder or Hugging Face id of a checkpoint in diffusers' format (default: {default}); its pipeline is {pipelines}",
    )
    parser.add_argument("--prompt", help="for a tiny model: the digits to draw")
    parser.add_argument("--image", type=Path, metavar="PATH", help="the picture to start from or to edit, for pipelines that take one")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps (default: %(default)s)")
    parser.add_argument("--size", type=_size, metavar="WxH", help="pixels (default: the pipeline's)")
    parser.add_argument("--frames", type=int, metavar="N", help="of a video (default: the pipeline's)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the component in use")
    parser.add_argument("--precompute-modulation", action="store_true", help="patched with modulations from a table (docs/modulation.md)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help="for what it writes (default: %(default)s)")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, such as 1024x1024, got {text!r}") from None
    return width, height


def loaded(options: argparse.Namespace, device: torch.device, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The pipeline where it is to run; ``dtype``: in the place of the option."""
    if options.offload and device.type == "cpu":
        raise CannotRun("--offload: there is no GPU to offload from")
    pipe = load(options.model, dtype or DTYPES[options.dtype], image=options.image is not None)
    return place(pipe, device, offload=options.offload)


def arguments(options: argparse.Namespace, pipe: DiffusionPipeline, default_prompt: str) -> dict[str, Any]:
    """Those of the pipeline's call, but for seed and steps."""
    return call_arguments(
        options.model,
        pipe,
        prompt=options.prompt,
        default_prompt=default_prompt,
        image=options.image,
        size=options.size,
        frames=options.frames,
    )


@contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the command with what can't be run, or with what needs less GPU memory."""
    try:
        yield
    except CannotRun as reason:
        parser.error(str(reason))
    except torch.OutOfMemoryError as error:
        parser.error(f"too little GPU memory: {str(error).splitlines()[0]} Try --offload, a smaller --size, fewer --frames.")
