"""Stable Diffusion 3 and 3.5, with a ControlNet."""

from typing import Any

import torch

from .configuration import TEXT_DIM, Tiny, random_text, timesteps

_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
_SD3_CALLS = (3 + 3 + 1, 3 + 2, 3 + 2, 0, 3)  # the last block has no text to return
_SD3_CONTROLNET_CALLS = (3 * 2 + 1, 3 * 2, 3 * 2 + 1, 1, 3)


def _sd3(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(b, 4, 8, 8, generator=g).to(dtype),
        "encoder_hidden_states": random_text(g, b, dtype),
        "pooled_projections": torch.randn(b, 8, generator=g).to(dtype),
        "timestep": timesteps(b),
    }


def _sd3_controlled(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    samples = [torch.randn(b, 16, 48, generator=g).to(dtype) for _ in range(2)]
    return _sd3(g, b, dtype) | {"block_controlnet_hidden_states": samples}


def _sd3_controlnet(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _sd3(g, b, dtype) | {"controlnet_cond": torch.randn(b, 4, 8, 8, generator=g).to(dtype)}


def _sd3_controlnet_without_text(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    """It is given what the transformer makes of the latents, in the layout of a convolution."""
    arguments = _sd3_controlnet(g, b, dtype)
    del arguments["encoder_hidden_states"]
    return arguments | {"hidden_states": torch.randn(b, 48, 16, generator=g).to(dtype).transpose(1, 2)}


MODELS = {
    "sd3.5-large": Tiny("SD3Transformer2DModel", _SD3, _sd3, _SD3_CALLS),
    # Two modulations of one norm, and a second attention, in the first blocks.
    "sd3.5-medium": Tiny("SD3Transformer2DModel", _SD3 | {"dual_attention_layers": (0, 1)}, _sd3, (3 + 3 + 1 + 2, 3 + 2, 3 + 2 + 2, 2, 3)),
    "sd3": Tiny("SD3Transformer2DModel", _SD3 | {"qk_norm": None}, _sd3, (*_SD3_CALLS[:3], 0, 0)),
    "sd3.5-controlled": Tiny("SD3Transformer2DModel", _SD3, _sd3_controlled, _SD3_CALLS),
    "sd3.5-controlnet": Tiny("SD3ControlNetModel", _SD3 | {"dual_attention_layers": (0,)}, _sd3_controlnet, _SD3_CONTROLNET_CALLS),
    "sd3.5-controlnet-without-text": Tiny(
        "SD3ControlNetModel",
        _SD3 | {"joint_attention_dim": None, "use_pos_embed": False, "qk_norm": None},
        _sd3_controlnet_without_text,
        (3, 3, 3, 0, 0),
    ),
}
