"""Z-Image-Turbo, with the defaults of diffusers' class.

Tokens: 2 x 2 latent pixels of 8 x 8, and the text's, of Qwen3.
"""

from typing import Any

import torch
from torch import Tensor

from ..real_model import RealModel, random

_TEXT = 128
_Z_IMAGE = {"n_layers": 30, "n_refiner_layers": 2, "cap_feat_dim": 2560}


def _z_image(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return {
        "x": list(latents.unbind(0)),
        "t": 1 - timestep.to(torch.float32).view(1) / 1000,
        "cap_feats": [random(latents, _TEXT, model.config["cap_feat_dim"])],
    }


MODELS = {
    "z-image-turbo": RealModel(
        title="Z-Image-Turbo 1024x1024",
        source="Tongyi-MAI/Z-Image-Turbo",
        cls="ZImageTransformer2DModel",
        config=_Z_IMAGE,
        measured={"n_layers": 30, "n_refiner_layers": 2},
        latents=(1, 16, 1, 128, 128),
        arguments=_z_image,
    ),
}
