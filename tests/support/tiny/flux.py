"""FLUX.1 and the models that are made of its blocks: LongCat-Image, Bria, Bria FIBO."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .configuration import TEXT, TEXT_DIM, Inputs, Tiny, random_text

FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (16, 24, 24),
}
SMALL_HEADS = {"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (4, 4, 8)}
FLUX_CALLS = (2 * 2 + 2 + 1, 2 * 2, 2 * 2 + 2, 2, 2)
_FLUX1 = FLUX | {"pooled_projection_dim": 8, "guidance_embeds": True}


def flux_inputs(*extra: str, axes: int = 3, **more: Any) -> Inputs:
    """An image of 16 tokens. ``extra``: names of what some models are given besides."""

    def make(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
        ids = torch.zeros(16, axes)
        ids[:, 1:3] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        arguments = {
            "hidden_states": torch.randn(b, 16, 4, generator=g).to(dtype),
            "encoder_hidden_states": random_text(g, b, dtype),
            "timestep": torch.linspace(0.3, 0.9, b).to(dtype),
            "img_ids": ids,
            "txt_ids": torch.zeros(TEXT, axes),
        }
        given = {"pooled_projections": torch.randn(b, 8, generator=g).to(dtype), "guidance": torch.tensor([3.5, 2.0])[:b].to(dtype)}
        arguments |= {name: given[name] for name in extra}
        return arguments | {k: v(g, b, dtype) for k, v in more.items()}

    return make


def _samples(count: int, width: int) -> Callable[[torch.Generator, int, torch.dtype], list[Tensor]]:
    """What a ControlNet hands over."""
    return lambda g, b, dtype: [torch.randn(b, 16, width, generator=g).to(dtype) for _ in range(count)]


MODELS = {
    "flux": Tiny("FluxTransformer2DModel", _FLUX1, flux_inputs("pooled_projections", "guidance"), FLUX_CALLS, 2),
    "flux-schnell": Tiny(
        "FluxTransformer2DModel",
        _FLUX1 | SMALL_HEADS | {"guidance_embeds": False},
        flux_inputs("pooled_projections"),
        FLUX_CALLS,
        2,
    ),
    "flux-controlled": Tiny(
        "FluxTransformer2DModel",
        _FLUX1,
        flux_inputs(
            "pooled_projections",
            "guidance",
            controlnet_block_samples=_samples(1, 192),
            controlnet_single_block_samples=_samples(2, 192),
        ),
        FLUX_CALLS,
        2,
    ),
    "flux-controlnet": Tiny(
        "FluxControlNetModel",
        _FLUX1 | {"num_mode": 2},
        flux_inputs(
            "pooled_projections",
            "guidance",
            controlnet_cond=lambda g, b, dtype: torch.randn(b, 16, 4, generator=g).to(dtype),
            controlnet_mode=lambda g, b, dtype: torch.arange(b)[:, None] % 2,
        ),
        (2 * 2 + 2, *FLUX_CALLS[1:]),
        2,
    ),
    "longcat-image": Tiny(
        "LongCatImageTransformer2DModel",
        FLUX | SMALL_HEADS | {"pooled_projection_dim": 8},
        flux_inputs("guidance"),
        FLUX_CALLS,
        2,
    ),
    "bria": Tiny("BriaTransformer2DModel", FLUX | SMALL_HEADS, flux_inputs(), FLUX_CALLS, 2),
    "bria-fibo": Tiny(
        "BriaFiboTransformer2DModel",
        FLUX | SMALL_HEADS | {"text_encoder_dim": TEXT_DIM},
        flux_inputs(text_encoder_layers=lambda g, b, dtype: [random_text(g, b, dtype) for _ in range(4)]),
        FLUX_CALLS,
        2,
    ),
}
