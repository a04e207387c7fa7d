"""Qwen-Image and Qwen-Image 2.1, with the defaults of diffusers' classes.

Tokens: 2 x 2 latent pixels of 8 x 8 for Qwen-Image; a latent pixel of 16 x 16 for Qwen-Image 2.1.
"""

from typing import Any

import torch
from torch import Tensor

from ..real_model import RealModel, ones, random

_QWEN_IMAGE = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584}
_QWEN_IMAGE21 = {"num_layers": 32, "num_attention_heads": 32, "attention_head_dim": 128, "context_in_dim": 4096}


def _qwen_image(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    side = int(model.tokens**0.5)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": random(latents, 1, 128, model.config["joint_attention_dim"]),
        "encoder_hidden_states_mask": ones(latents, 1, 128),
        "timestep": timestep.to(latents.dtype).view(1) / 1000,
        "img_shapes": [[(1, side, side)]],
    }


def _qwen_image21(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    side = int(model.tokens**0.5)
    words, slots = (torch.full((1, n), value, device=latents.device) for n, value in ((128, False), (model.tokens // 4, True)))
    return {
        "hidden_states": latents,
        "encoder_hidden_states": random(latents, 1, 128, model.config["context_in_dim"]),
        "encoder_hidden_states_mask": ~words,
        "timestep": timestep.to(latents.dtype).view(1) / 1000,
        "img_shapes": [[(1, side, side)]],
        "img_mask": torch.cat([words, slots], dim=1),
    }


MODELS = {
    "qwen-image": RealModel(
        title="Qwen-Image 1024x1024",
        source="Qwen/Qwen-Image",
        cls="QwenImageTransformer2DModel",
        config=_QWEN_IMAGE,
        measured={"num_layers": 60},
        latents=(1, 4096, 64),
        arguments=_qwen_image,
    ),
    "qwen-image-2.1": RealModel(
        title="Qwen-Image 2.1 1024x1024",
        source="Qwen/Qwen-Image-2.1",
        cls="QwenImage21Transformer2DModel",
        config=_QWEN_IMAGE21,
        measured={"num_layers": 32},
        latents=(1, 4096, 64),
        arguments=_qwen_image21,
    ),
}
