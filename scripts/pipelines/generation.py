"""Runs a pipeline from a seed and keeps what each step made."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from common.execution import synchronize
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

SEED = 0


@dataclass(frozen=True)
class Generation:
    """What one call of a pipeline made; tensors on the CPU."""

    noise: tuple[Tensor, ...]
    """What the pipeline drew, in the shapes that it drew; LTX-2's draws for its sound, too."""
    latents: tuple[Tensor, ...]
    """After each step; those of the sound behind those of the video."""
    frames: Tensor
    """Decoded, ``[B, F, C, H, W]``, 0 to 1, float32; a picture has F = 1. C = 3, or 4 with alpha,
    which Qwen-Image 2.1 draws.
    """
    seconds: float


def generate(
    pipe: DiffusionPipeline,
    arguments: Mapping[str, Any],
    steps: int,
    *,
    noise: tuple[Tensor, ...] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Generation:
    """Calls the pipeline with the one seed, or with ``noise``, what another run drew, in the place
    of what it would draw.
    """
    drawn: list[Tensor] = []
    latents: list[Tensor] = []

    def draw(randn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        result = randn(*args, **kwargs)
        if noise is not None:
            result = noise[len(drawn)].to(result)
        drawn.append(result.cpu())
        return result

    def keep(step: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(scheduler, *args, **kwargs)
        stepped = (result[0] if isinstance(result, tuple) else result.prev_sample).cpu()
        if scheduler is pipe.scheduler:
            latents.append(stepped)
            on_step()
        else:  # a copy, for the sound
            latents[-1] = torch.cat([latents[-1].flatten(), stepped.flatten()])
        return result

    synchronize()
    start = time.perf_counter()
    # Not callback_on_step_end: HunyuanVideo-1.5's pipelines have none. Not the argument latents:
    # into these, too, HunyuanVideo mixes the picture that it animates.
    with wrapped(sys.modules[type(pipe).__module__], "randn_tensor", draw), wrapped(type(pipe.scheduler), "step", keep):
        output, *_ = pipe(
            **arguments,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
            return_dict=False,
        )
    frames = output.float().cpu()
    seconds = time.perf_counter() - start
    return Generation(tuple(drawn), tuple(latents), frames[:, None] if frames.dim() == 4 else frames, seconds)


@contextmanager
def wrapped(owner: object, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, ``owner.name(...)`` calls ``around(function, ...)``."""
    method = getattr(owner, name)
    with mock.patch.object(owner, name, lambda *args, **kwargs: around(method, *args, **kwargs)):
        yield


def denoisers(pipe: DiffusionPipeline) -> list[ModelMixin]:
    """The transformers of a pipeline; Wan2.2-A14B has two."""
    return [module for name in ("transformer", "transformer_2") if (module := getattr(pipe, name, None)) is not None]
