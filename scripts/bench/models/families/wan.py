"""Wan: of the 1.3B and A14B models, the configurations of diffusers'
``scripts/convert_wan_to_diffusers.py``; of TI2V-5B, that of ``wan/configs/wan_ti2v_5B.py`` in Wan's
own repository.

Tokens: a latent frame every 4 frames (the first alone), 2 x 2 latent pixels of 8 x 8 (16 x 16 for
TI2V-5B).
"""

from typing import Any

from torch import Tensor

from ..real_model import RealModel, random

_WAN = {"attention_head_dim": 128, "text_dim": 4096}
_WAN_1_3B = _WAN | {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
_WAN_5B = _WAN | {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_WAN_A14B = _WAN | {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}


def _wan(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": random(latents, 1, 512, model.config["text_dim"]),
        "timestep": timestep.view(1),
    }


def _wan_per_token(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return _wan(model, latents, timestep) | {"timestep": timestep.expand(1, model.tokens)}


MODELS = {
    "wan2.1-1.3b": RealModel(
        title="Wan2.1-1.3B 832x480x81",
        source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        cls="WanTransformer3DModel",
        config=_WAN_1_3B,
        measured={"num_layers": 30},
        latents=(1, 16, 21, 60, 104),
        arguments=_wan,
    ),
    "wan2.2-ti2v-5b": RealModel(
        title="Wan2.2-TI2V-5B 1280x704x121",
        source="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        cls="WanTransformer3DModel",
        config=_WAN_5B,
        measured={"num_layers": 30},
        latents=(1, 48, 31, 44, 80),
        arguments=_wan_per_token,
    ),
    "wan2.2-a14b": RealModel(
        title="Wan2.2-A14B 1280x720x81",
        source="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        cls="WanTransformer3DModel",
        config=_WAN_A14B,
        measured={"num_layers": 8},
        latents=(1, 16, 21, 90, 160),
        arguments=_wan,
    ),
}
