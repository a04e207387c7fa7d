"""Wan: 2.1 and 2.2, per-token modulation (TI2V-5B), WanAnimate, VACE, ChronoEdit."""

from typing import Any

import torch

from .configuration import TEXT_DIM, Tiny, random_text, random_video, timesteps

IMAGE_TOKENS = 5
_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
_WAN_IMAGE = _WAN | {"image_dim": TEXT_DIM, "added_kv_proj_dim": 24}
_WAN_CALLS = (3, 3 * 2, 3, 3 * 2, 0)


def _wan(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"hidden_states": random_video(g, b, dtype), "timestep": timesteps(b), "encoder_hidden_states": random_text(g, b, dtype)}


def _wan_image(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _wan(g, b, dtype) | _image_and_text(g, b, dtype)


def _image_and_text(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    """Upstream takes all tokens but the last 512 for those of the image."""
    return {
        "encoder_hidden_states": random_text(g, b, dtype, tokens=512),
        "encoder_hidden_states_image": random_text(g, b, dtype, IMAGE_TOKENS),
    }


def _wan_per_token(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    timestep = timesteps(b)[:, None].repeat(1, 2 * 4 * 4)
    timestep[:, :16] = 0  # the first frame is given
    return _wan(g, b, dtype) | {"timestep": timestep}


def _wan_per_token_of_text(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _wan(g, b, dtype) | {"timestep": timesteps(b)[:, None].repeat(1, 2 * 4 * 4)}


def _wan_animate(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": random_video(g, b, dtype, channels=12, frames=3),
        "timestep": timesteps(b),
        **_image_and_text(g, b, dtype),
        "pose_hidden_states": random_video(g, b, dtype, frames=2),
        "face_pixel_values": torch.randn(b, 3, 5, 16, 16, generator=g).to(dtype),
    }


def _wan_vace(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _wan(g, b, dtype) | {"control_hidden_states": random_video(g, b, dtype, channels=6)}


MODELS = {
    "wan-t2v": Tiny("WanTransformer3DModel", _WAN, _wan, _WAN_CALLS),
    "wan-i2v": Tiny("WanTransformer3DModel", _WAN_IMAGE, _wan_image, _WAN_CALLS),
    "wan-ti2v": Tiny("WanTransformer3DModel", _WAN, _wan_per_token, _WAN_CALLS),
    "wan-ti2v-text": Tiny("WanTransformer3DModel", _WAN, _wan_per_token_of_text, _WAN_CALLS),
    "wan-without-cross-attn-norm": Tiny("WanTransformer3DModel", _WAN | {"cross_attn_norm": False}, _wan, (3, 3, 2 * 3, 3 * 2, 0)),
    "wan-animate": Tiny(
        "WanAnimateTransformer3DModel",
        _WAN_IMAGE
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
            "num_layers": 4,
        },
        _wan_animate,
        (4, 4 * 2, 4, 4 * 2, 0),
    ),
    "wan-vace": Tiny(
        "WanVACETransformer3DModel", _WAN | {"vace_layers": [0, 2], "vace_in_channels": 6}, _wan_vace, (5, 5 * 2, 5, 5 * 2, 0)
    ),
    "chronoedit": Tiny("ChronoEditTransformer3DModel", _WAN_IMAGE, _wan_image, _WAN_CALLS),
}
