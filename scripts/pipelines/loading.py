"""Loads pipelines in diffusers' format, also those of ``examples/digits``, which come without text
encoders.
"""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from digits.families import FAMILIES, PROMPTS, TinyPipeline
from digits.untrained import UNTRAINED
from packaging.version import Version
from PIL import Image

PICTURE_OPTIONAL = {"QwenImage21Pipeline", "Flux2Pipeline", "Flux2KleinPipeline"}
"""Pipelines that need no picture but take one. Signatures don't tell: Edit's has a default for it,
with which its call fails.
"""


DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
"""What ``from_pretrained`` calls its argument."""


class CannotRun(Exception):
    """What the user asked for can't be run; the message says why and what would."""


def pipeline_class(model: str, image: bool) -> type[DiffusionPipeline]:
    """The class that a checkpoint names; Wan's image-to-video one where text-to-video is named
    (TI2V) and an image is given.
    """
    try:
        config = DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        raise CannotRun(f"{model}: no pipeline in diffusers' format there: {error}") from error
    name = config["_class_name"]
    if name == "WanPipeline" and image and config.get("expand_timesteps"):
        name = "WanImageToVideoPipeline"
    found = getattr(diffusers, name, None)
    if found is None:
        raise CannotRun(f"{model} is a {name}, which diffusers {diffusers.__version__} doesn't have")
    return found


def load(model: str, dtype: torch.dtype, *, image: bool = False) -> DiffusionPipeline:
    """The pipeline of ``model``, a folder or an id of the Hugging Face hub, on the CPU.
    :exc:`CannotRun` where it can't be loaded.
    """
    cls = pipeline_class(model, image)
    config = DiffusionPipeline.load_config(model)
    absent: dict[str, Any] = {name: None for name, value in config.items() if isinstance(value, list) and value[0] is None}
    try:
        pipe = cls.from_pretrained(model, **{DTYPE: dtype}, **absent)
    except (ImportError, OSError, ValueError) as error:
        raise CannotRun(f"{model}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def place(pipe: DiffusionPipeline, device: torch.device, *, offload: bool = False) -> DiffusionPipeline:
    """Moves the pipeline to ``device``, or each component only for the time of its use."""
    if not offload:
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)
    return pipe


def tiny_pipeline(model: str) -> TinyPipeline | None:
    """What ``model`` is, if it is a folder of a tiny pipeline."""
    if not (Path(model) / PROMPTS).is_file():
        return None
    named = DiffusionPipeline.load_config(model)["_class_name"]
    return next((tiny for tiny in (*FAMILIES.values(), *UNTRAINED.values()) if named == tiny.pipeline), None)


def call_arguments(
    model: str,
    pipe: DiffusionPipeline,
    *,
    prompt: str | None,
    default_prompt: str,
    image: Path | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Arguments of the pipeline's call, but for seed and steps. ``size``: width and height in
    pixels.

    A tiny pipeline draws one picture for each digit of the prompt, all ten by default.
    :exc:`CannotRun` for what the pipeline doesn't take.
    """
    tiny = tiny_pipeline(model)
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {}
    if tiny is not None:
        digits = "0123456789" if prompt is None else prompt
        if not (digits.isascii() and digits.isdigit()):
            raise CannotRun(f"--prompt: {model} draws the digits of its prompt, such as 2026; got {prompt!r}")
        arguments |= tiny.call_arguments([int(digit) for digit in digits], pipe, Path(model))
    else:
        arguments["prompt"] = default_prompt if prompt is None else prompt
    if image is not None:
        if "image" not in taken:
            raise CannotRun(f"{model} is a {type(pipe).__name__}, which takes no --image")
        arguments["image"] = Image.open(image).convert("RGB")
    elif "image" in taken and type(pipe).__name__ not in PICTURE_OPTIONAL:
        raise CannotRun(f"{model} is a {type(pipe).__name__}: it needs --image PATH")
    given = {"width": size and size[0], "height": size and size[1], "num_frames": frames}
    for name, value in given.items():
        if value is None:
            continue
        if name not in taken:
            raise CannotRun(f"{type(pipe).__name__} takes no {name}")
        arguments[name] = value
    return arguments
