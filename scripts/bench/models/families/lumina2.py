"""Lumina-Image 2.0, with the defaults of diffusers' class but for the width of its text, which
Gemma 2 makes.

Tokens: 2 x 2 latent pixels of 8 x 8, and the text's.
"""

from typing import Any

from torch import Tensor

from ..real_model import RealModel, ones, random

_TEXT = 256
_LUMINA2 = {"num_layers": 26, "num_refiner_layers": 2, "cap_feat_dim": 2304}


def _lumina2(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": 1 - timestep.view(1) / 1000,
        "encoder_hidden_states": random(latents, _TEXT, model.config["cap_feat_dim"])[None],
        "encoder_attention_mask": ones(latents, 1, _TEXT),
    }


MODELS = {
    "lumina-image-2.0": RealModel(
        title="Lumina-Image 2.0 1024x1024",
        source="Alpha-VLLM/Lumina-Image-2.0",
        cls="Lumina2Transformer2DModel",
        config=_LUMINA2,
        measured={"num_layers": 26, "num_refiner_layers": 2},
        latents=(1, 16, 128, 128),
        arguments=_lumina2,
    ),
}
