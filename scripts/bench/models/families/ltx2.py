"""LTX-2, with the configuration of diffusers' ``scripts/convert_ltx2_to_diffusers.py``: that of the
class, but for the pairs that are rotated.

Tokens: a latent frame every 8 frames (the first alone), latent pixels of 32 x 32; of audio 25
latents a second, and 1024 of text, none of them masked, since registers stand in for padding.
"""

from typing import Any

import torch
from torch import Tensor

from ..real_model import RealModel, ones, random

_FRAMES, _HEIGHT, _WIDTH = 16, 16, 24  # latent ones, of 768x512x121
_AUDIO, _TEXT = 126, 1024
_LTX2 = {"num_layers": 48, "rope_type": "split", "caption_channels": 3840, "audio_in_channels": 128}


def _ltx2(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    channels, of_frame = model.config["caption_channels"], model.tokens // _FRAMES
    height = min(_HEIGHT, of_frame)
    return {
        "hidden_states": latents,
        "audio_hidden_states": random(latents, 1, _AUDIO, model.config["audio_in_channels"]),
        "encoder_hidden_states": random(latents, 1, _TEXT, channels),
        "audio_encoder_hidden_states": random(latents, 1, _TEXT, channels),
        "timestep": timestep.to(torch.float32).view(1),
        "encoder_attention_mask": ones(latents, 1, _TEXT),
        "audio_encoder_attention_mask": ones(latents, 1, _TEXT),
        "num_frames": _FRAMES,
        "height": height,
        "width": of_frame // height,
        "audio_num_frames": _AUDIO,
    }


MODELS = {
    "ltx-2": RealModel(
        title="LTX-2 768x512x121",
        source="Lightricks/LTX-2",
        cls="LTX2VideoTransformer3DModel",
        config=_LTX2,
        measured={"num_layers": 48},
        latents=(1, _FRAMES * _HEIGHT * _WIDTH, 128),
        arguments=_ltx2,
    ),
}
