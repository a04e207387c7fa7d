"""HunyuanVideo, HunyuanVideo-1.5, HunyuanImage."""

from typing import Any

import torch

from .configuration import TEXT_DIM, Tiny, random_text, random_video, text_mask, timesteps

_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_DIM,
    "rope_axes_dim": (4, 4, 4),
}
_HUNYUAN_VIDEO = _HUNYUAN | {"num_single_layers": 2, "pooled_projection_dim": 8, "guidance_embeds": True}
_HUNYUAN_CALLS = (2 * 2 + 2 + 1, 2 * 2, 2 * 2 + 2 * 2, 2, 2)


def _hunyuan_video(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": random_video(g, b, dtype),
        "timestep": timesteps(b),
        "encoder_hidden_states": random_text(g, b, dtype),
        "encoder_attention_mask": text_mask(b),
        "pooled_projections": torch.randn(b, 8, generator=g).to(dtype),
        "guidance": torch.tensor([6.0, 4.0])[:b].to(dtype) * 1000,
    }


def _hunyuan_video_framepack(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _hunyuan_video(g, b, dtype) | {
        "image_embeds": torch.randn(b, 3, 16, generator=g).to(dtype),
        "indices_latents": torch.arange(5, 7),
        "latents_clean": random_video(g, b, dtype, frames=2),
        "indices_latents_clean": torch.tensor([0, 4]),
        "latents_history_2x": random_video(g, b, dtype, frames=2),
        "indices_latents_history_2x": torch.arange(2, 4),
        "latents_history_4x": random_video(g, b, dtype, frames=4),
        "indices_latents_history_4x": torch.arange(0, 4),
    }


def _hunyuan_video15(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": random_video(g, b, dtype),
        "timestep": timesteps(b).to(dtype),
        "encoder_hidden_states": random_text(g, b, dtype),
        "encoder_attention_mask": text_mask(b),
        "encoder_hidden_states_2": torch.randn(b, 6, 12, generator=g).to(dtype),
        "encoder_attention_mask_2": text_mask(b, 6),
        "image_embeds": torch.randn(b, 3, 12, generator=g).to(dtype),
    }


def _hunyuan_image(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(b, 4, 4, 4, generator=g).to(dtype),
        "timestep": timesteps(b).to(dtype),
        "encoder_hidden_states": random_text(g, b, dtype),
        "encoder_attention_mask": text_mask(b),
    }


MODELS = {
    "hunyuan-video": Tiny("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO, _hunyuan_video, _HUNYUAN_CALLS, 2),
    "hunyuan-video-token-replace": Tiny(
        "HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO | {"image_condition_type": "token_replace"}, _hunyuan_video, _HUNYUAN_CALLS, 2
    ),
    "hunyuan-video-framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        _HUNYUAN_VIDEO | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        _hunyuan_video_framepack,
        _HUNYUAN_CALLS,
        2,
    ),
    "hunyuan-video-1.5": Tiny(
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN | {"text_embed_2_dim": 12, "image_embed_dim": 12},
        _hunyuan_video15,
        (2 * 2 + 1, 2 * 2, 2 * 2, 0, 2),
    ),
    "hunyuan-image": Tiny(
        "HunyuanImageTransformer2DModel", _HUNYUAN | {"num_single_layers": 2, "rope_axes_dim": (8, 4)}, _hunyuan_image, _HUNYUAN_CALLS, 2
    ),
}
