"""FLUX.1 and Chroma, with the configurations of the published models.

Tokens: 2 x 2 latent pixels of 8 x 8, and 512 of T5 as text. Chroma's mask is added to the scores of
attention, as its pipeline makes it.
"""

from typing import Any

import torch
from torch import Tensor

from ..real_model import RealModel, random

_TEXT = 512
_FLUX = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096}
_FLUX1 = _FLUX | {"pooled_projection_dim": 768, "guidance_embeds": True}
_CHROMA = _FLUX | {"approximator_num_channels": 64, "approximator_hidden_dim": 5120, "approximator_layers": 5}


def _joint(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    side = int(model.tokens**0.5)
    ids = latents.new_zeros(side, side, 3)
    ids[..., 1] += torch.arange(side, device=latents.device)[:, None]
    ids[..., 2] += torch.arange(side, device=latents.device)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": random(latents, 1, _TEXT, model.config["joint_attention_dim"]),
        "timestep": timestep.to(latents.dtype).view(1) / 1000,
        "img_ids": ids.view(-1, 3),
        "txt_ids": latents.new_zeros(_TEXT, 3),
    }


def _flux(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return _joint(model, latents, timestep) | {
        "pooled_projections": random(latents, 1, model.config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 3.5, device=latents.device),
    }


def _chroma(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    mask = latents.new_ones(1, _TEXT + model.tokens)
    mask[:, 64:_TEXT] = 0  # a prompt of 64 tokens
    return _joint(model, latents, timestep) | {"attention_mask": mask}


MODELS = {
    "flux.1-dev": RealModel(
        title="FLUX.1-dev 1024x1024",
        source="black-forest-labs/FLUX.1-dev",
        cls="FluxTransformer2DModel",
        config=_FLUX1,
        measured={"num_layers": 19, "num_single_layers": 38},
        latents=(1, 4096, 64),
        arguments=_flux,
    ),
    "chroma": RealModel(
        title="Chroma 1024x1024",
        source="lodestones/Chroma1-HD",
        cls="ChromaTransformer2DModel",
        config=_CHROMA,
        measured={"num_layers": 19, "num_single_layers": 38},
        latents=(1, 4096, 64),
        arguments=_chroma,
    ),
}
