"""HunyuanVideo, with the defaults of diffusers' class, and HunyuanVideo-1.5, with the configuration
of diffusers' ``scripts/convert_hunyuan_video1_5_to_diffusers.py``.

Tokens: a latent frame every 4 frames (the first alone), 2 x 2 latent pixels of 8 x 8; for
HunyuanVideo-1.5 one of 16 x 16.
"""

from typing import Any

import torch
from torch import Tensor

from ..real_model import RealModel, ones, random

_HUNYUAN_VIDEO = {
    "num_layers": 20,
    "num_single_layers": 40,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
}
_HUNYUAN_VIDEO15 = {
    "num_layers": 54,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "in_channels": 65,
    "out_channels": 32,
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
    "task_type": "t2v",
}


def _hunyuan_video(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timestep.to(latents.dtype).view(1),
        "encoder_hidden_states": random(latents, 1, 256, model.config["text_embed_dim"]),
        "encoder_attention_mask": ones(latents, 1, 256),
        "pooled_projections": random(latents, 1, model.config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 6000.0, dtype=latents.dtype, device=latents.device),
    }


def _hunyuan_video15(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    # Text to video: no first frame, an empty mask.
    condition = latents.new_zeros(1, latents.shape[1] + 1, *latents.shape[2:])
    return {
        "hidden_states": torch.cat([latents, condition], dim=1),
        "timestep": timestep.to(latents.dtype).view(1),
        "encoder_hidden_states": random(latents, 1, 1000, model.config["text_embed_dim"]),
        "encoder_attention_mask": ones(latents, 1, 1000),
        "encoder_hidden_states_2": random(latents, 1, 256, model.config["text_embed_2_dim"]),
        "encoder_attention_mask_2": ones(latents, 1, 256),
        "image_embeds": latents.new_zeros(1, 729, model.config["image_embed_dim"]),
    }


MODELS = {
    "hunyuan-video-480p": RealModel(
        title="HunyuanVideo 848x480x65",
        source="hunyuanvideo-community/HunyuanVideo",
        cls="HunyuanVideoTransformer3DModel",
        config=_HUNYUAN_VIDEO,
        measured={"num_layers": 20, "num_single_layers": 40},
        latents=(1, 16, 17, 60, 106),
        arguments=_hunyuan_video,
    ),
    "hunyuan-video-720p": RealModel(
        title="HunyuanVideo 1280x720x129",
        source="hunyuanvideo-community/HunyuanVideo",
        cls="HunyuanVideoTransformer3DModel",
        config=_HUNYUAN_VIDEO,
        measured={"num_layers": 2, "num_single_layers": 4},
        latents=(1, 16, 33, 90, 160),
        arguments=_hunyuan_video,
    ),
    "hunyuan-video-1.5": RealModel(
        title="HunyuanVideo-1.5 848x480x121",
        source="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        cls="HunyuanVideo15Transformer3DModel",
        config=_HUNYUAN_VIDEO15,
        measured={"num_layers": 8},
        latents=(1, 32, 31, 30, 53),
        arguments=_hunyuan_video15,
        patch=1,
    ),
}
