"""Stable Diffusion 3.5, with the configurations of the published models: Large, and Medium, whose
first blocks have a second attention.

Tokens: 2 x 2 latent pixels of 8 x 8; 77 of the CLIP models and 256 of T5 as text. One sample, as
Large Turbo takes them: of the others guidance makes two.
"""

from typing import Any

from torch import Tensor

from ..real_model import RealModel, random

_SD35 = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
_LARGE = _SD35 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 38 * 64, "pos_embed_max_size": 192}
_MEDIUM = _SD35 | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 24 * 64,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}


def _sd35(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": random(latents, 1, 77 + 256, model.config["joint_attention_dim"]),
        "pooled_projections": random(latents, 1, model.config["pooled_projection_dim"]),
        "timestep": timestep.view(1),
    }


MODELS = {
    "sd3.5-large": RealModel(
        title="SD3.5 Large 1024x1024",
        source="stabilityai/stable-diffusion-3.5-large",
        cls="SD3Transformer2DModel",
        config=_LARGE,
        measured={"num_layers": 38},
        latents=(1, 16, 128, 128),
        arguments=_sd35,
    ),
    "sd3.5-medium": RealModel(
        title="SD3.5 Medium 1024x1024",
        source="stabilityai/stable-diffusion-3.5-medium",
        cls="SD3Transformer2DModel",
        config=_MEDIUM,
        measured={"num_layers": 24},
        latents=(1, 16, 128, 128),
        arguments=_sd35,
    ),
}
