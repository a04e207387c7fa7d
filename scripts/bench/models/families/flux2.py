"""FLUX.2 (dev) and FLUX.2 Klein (4B, 9B), with the configurations of the published models.

Tokens: 2 x 2 latent pixels of 8 x 8, and 512 of text.
"""

from typing import Any

import torch
from torch import Tensor

from ..real_model import RealModel, random

_TEXT = 512
_DEV = {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "attention_head_dim": 128, "joint_attention_dim": 15360}
_KLEIN = {"attention_head_dim": 128, "guidance_embeds": False}
_KLEIN_4B = _KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560}
_KLEIN_9B = _KLEIN | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 3 * 4096}


def _klein(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    side = int(model.tokens**0.5)
    ids, words = (torch.zeros(1, n, 4, device=latents.device) for n in (model.tokens, _TEXT))
    ids[0, :, 1:3] = torch.cartesian_prod(*[torch.arange(float(side), device=latents.device)] * 2)
    words[0, :, 3] = torch.arange(float(_TEXT), device=latents.device)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": random(latents, 1, _TEXT, model.config["joint_attention_dim"]),
        "timestep": timestep.to(latents.dtype).view(1) / 1000,
        "img_ids": ids,
        "txt_ids": words,
    }


def _dev(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return _klein(model, latents, timestep) | {"guidance": torch.full((1,), 4.0, device=latents.device)}


MODELS = {
    "flux.2-dev": RealModel(
        title="FLUX.2-dev 1024x1024",
        source="black-forest-labs/FLUX.2-dev",
        cls="Flux2Transformer2DModel",
        config=_DEV,
        measured={"num_layers": 8, "num_single_layers": 48},
        latents=(1, 4096, 128),
        arguments=_dev,
    ),
    "flux.2-klein-4b": RealModel(
        title="FLUX.2 Klein 4B 1024x1024",
        source="black-forest-labs/FLUX.2-klein-4B",
        cls="Flux2Transformer2DModel",
        config=_KLEIN_4B,
        measured={"num_layers": 5, "num_single_layers": 20},
        latents=(1, 4096, 128),
        arguments=_klein,
    ),
    "flux.2-klein-9b": RealModel(
        title="FLUX.2 Klein 9B 1024x1024",
        source="black-forest-labs/FLUX.2-klein-9B",
        cls="Flux2Transformer2DModel",
        config=_KLEIN_9B,
        measured={"num_layers": 8, "num_single_layers": 24},
        latents=(1, 4096, 128),
        arguments=_klein,
    ),
}
