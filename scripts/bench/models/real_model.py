"""One published model at one size: its configuration as data, random weights, and random inputs
like those that its pipeline makes.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16

Arguments = Callable[["RealModel", Tensor, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class RealModel:
    """One model at one size."""

    title: str
    source: str
    cls: str
    config: Mapping[str, Any]
    """Only what differs from the defaults of ``cls``, and the numbers of layers."""
    measured: Mapping[str, int]
    """Layers to measure: all, or so many that a step takes a few seconds on an H200."""
    latents: tuple[int, ...]
    """Shape of what the model denoises: [1, tokens, channels], [1, channels, height, width] or [1,
    channels, frames, height, width].
    """
    arguments: Arguments
    """The forward's arguments for latents and a timestep (0 to 1000, 0-d)."""
    patch: int = 2
    """Latent pixels on the side of a token, where the latents have a height and a width."""

    @property
    def tokens(self) -> int:
        """Latent tokens, without the text."""
        if len(self.latents) == 3:
            return self.latents[1]
        *frames, height, width = self.latents[2:]
        return math.prod(frames) * (height // self.patch) * (width // self.patch)

    def layers(self, each: int | None) -> dict[str, int]:
        """The layers to build: ``each`` of every kind, or those to measure."""
        return dict(self.measured) if each is None else {kind: min(each, self.config[kind]) for kind in self.measured}

    def noise(self, device: torch.device) -> Tensor:
        """The latents that denoising starts from, the same every time."""
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(self.latents, generator=generator, device=device).to(DTYPE)

    def velocity(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """What ``model`` makes of the latents. Qwen-Image 2.1 returns those of the text before
        them.
        """
        output: Tensor = model(**arguments, return_dict=False)[0]
        if isinstance(output, list):  # a picture each
            output = torch.stack(output)
        return output[:, -self.tokens :] if len(self.latents) == 3 else output

    def build(self, layers: Mapping[str, int], device: torch.device) -> nn.Module:
        """The model with random weights, in the dtypes that
        ``from_pretrained(torch_dtype=torch.bfloat16)`` gives its parameters and what else a
        checkpoint has.
        """
        cls = getattr(diffusers, self.cls)
        default = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(DTYPE)
            with device:
                model = cls(**{**self.config, **layers})
        finally:
            torch.set_default_dtype(default)
        kept = set(cls._keep_in_fp32_modules or ())
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.data = buffer.data.to(DTYPE)
        return model.eval().requires_grad_(False)


def random(like: Tensor, *shape: int) -> Tensor:
    """Noise on the device of ``like``. It is made once, so that no step is timed with it."""
    return _noise(like.device, *shape)


def ones(like: Tensor, *shape: int) -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(*shape, dtype=torch.long, device=like.device)


@functools.lru_cache(maxsize=8)
def _noise(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(*shape, generator=generator, device=device).to(DTYPE)
