"""Tiny random models of every supported family, made by diffusers' own classes, and inputs for them."""

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = Callable[[torch.Generator, int, torch.dtype], dict[str, Any]]

TEXT, TEXT_DIM = 7, 16
WAN_IMAGE_TOKENS = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = [1, 2]


@dataclass(frozen=True)
class Tiny:
    """``cls(**config)`` with ``inputs`` for its forward; ``calls``: fused calls of one forward, in the order of ``kernels.OPS``."""

    cls: str
    config: dict[str, Any]
    inputs: Inputs
    calls: tuple[int, int, int, int, int]


def load(name: str, dtype: torch.dtype) -> nn.Module:
    """The model with the same random weights for every dtype, as ``from_pretrained`` makes it (some parameters stay in float32)."""
    return copy.deepcopy(_load(name, dtype))


@functools.cache
def _load(name: str, dtype: torch.dtype) -> nn.Module:
    tiny = MODELS[name]
    cls = getattr(diffusers, tiny.cls)
    torch.manual_seed(0)
    model = cls(**tiny.config)
    with torch.no_grad():
        for p in model.parameters():  # some are zero, and zero gates would hide the branches
            p.add_(torch.randn_like(p) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return cls.from_pretrained(folder, torch_dtype=dtype).eval()


def inputs(name: str, batch: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Arguments of the model's forward; floating-point ones in ``dtype``."""
    return MODELS[name].inputs(torch.Generator().manual_seed(seed), batch, dtype)


@torch.no_grad()
def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The output; the samples of a ControlNet stacked."""
    # WanAnimate writes into a convolution's output and HunyuanVideo makes masks of its inputs: give every call its own.
    output = model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}, return_dict=False)
    return output[0] if isinstance(output, tuple) else torch.stack(output)


def _qwen_image(shapes: list[Any], channels: int = 16, **more: Any) -> Inputs:
    def make(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
        tokens = sum(f * h * w for f, h, w in shapes)
        mask = torch.ones(b, TEXT, dtype=torch.long)
        mask[-1, -2:] = 0
        arguments = {
            "hidden_states": torch.randn(b, tokens, channels, generator=g).to(dtype),
            "encoder_hidden_states": torch.randn(b, TEXT, TEXT_DIM, generator=g).to(dtype),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.linspace(0.3, 0.9, b).to(dtype),
            "img_shapes": [shapes] * b,
        }
        return arguments | {k: v(g, b, tokens, dtype) for k, v in more.items()}

    return make


def _qwen_image21(shapes: list[tuple[int, int, int]]) -> Inputs:
    """The text, a slot for each four tokens of the first pictures, more text, and the slots of the last picture, which is the target."""

    def make(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
        slots = [f * h * w // 4 for f, h, w in shapes]
        layout = [False] * 3 + [slot for count in slots[:-1] for slot in [True] * count + [False]] + [False] * 2
        text_mask = torch.ones(b, len(layout), dtype=torch.bool)
        text_mask[-1, -1:] = False
        return {
            "hidden_states": torch.randn(b, 4 * sum(slots), 16, generator=g).to(dtype),
            "encoder_hidden_states": torch.randn(b, len(layout), TEXT_DIM, generator=g).to(dtype),
            "encoder_hidden_states_mask": text_mask,
            "timestep": torch.linspace(0.3, 0.9, b).to(dtype),
            "img_shapes": [shapes] * b,
            "img_mask": torch.tensor([layout + [True] * slots[-1]] * b),
        }

    return make


def _video(g: torch.Generator, b: int, dtype: torch.dtype, channels: int = 4, frames: int = 2) -> Tensor:
    return torch.randn(b, channels, frames, 8, 8, generator=g).to(dtype)


def _text(g: torch.Generator, b: int, dtype: torch.dtype, tokens: int = TEXT) -> Tensor:
    return torch.randn(b, tokens, TEXT_DIM, generator=g).to(dtype)


def _mask(b: int, tokens: int = TEXT) -> Tensor:
    mask = torch.ones(b, tokens, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def _timestep(b: int) -> Tensor:
    return torch.tensor([700, 300])[:b]


def _wan(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"hidden_states": _video(g, b, dtype), "timestep": _timestep(b), "encoder_hidden_states": _text(g, b, dtype)}


def _wan_image(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _wan(g, b, dtype) | _image_and_text(g, b, dtype)


def _image_and_text(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    """Upstream takes all tokens but the last 512 for those of the image."""
    return {"encoder_hidden_states": _text(g, b, dtype, tokens=512), "encoder_hidden_states_image": _text(g, b, dtype, WAN_IMAGE_TOKENS)}


def _wan_per_token(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    timestep = _timestep(b)[:, None].repeat(1, 2 * 4 * 4)
    timestep[:, :16] = 0  # the first frame is given
    return _wan(g, b, dtype) | {"timestep": timestep}


def _wan_animate(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _video(g, b, dtype, channels=12, frames=3),
        "timestep": _timestep(b),
        **_image_and_text(g, b, dtype),
        "pose_hidden_states": _video(g, b, dtype, frames=2),
        "face_pixel_values": torch.randn(b, 3, 5, 16, 16, generator=g).to(dtype),
    }


def _wan_vace(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _wan(g, b, dtype) | {"control_hidden_states": _video(g, b, dtype, channels=6)}


def _hunyuan_video(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _video(g, b, dtype),
        "timestep": _timestep(b),
        "encoder_hidden_states": _text(g, b, dtype),
        "encoder_attention_mask": _mask(b),
        "pooled_projections": torch.randn(b, 8, generator=g).to(dtype),
        "guidance": torch.tensor([6.0, 4.0])[:b].to(dtype) * 1000,
    }


def _hunyuan_video_framepack(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return _hunyuan_video(g, b, dtype) | {
        "image_embeds": torch.randn(b, 3, 16, generator=g).to(dtype),
        "indices_latents": torch.arange(5, 7),
        "latents_clean": _video(g, b, dtype, frames=2),
        "indices_latents_clean": torch.tensor([0, 4]),
        "latents_history_2x": _video(g, b, dtype, frames=2),
        "indices_latents_history_2x": torch.arange(2, 4),
        "latents_history_4x": _video(g, b, dtype, frames=4),
        "indices_latents_history_4x": torch.arange(0, 4),
    }


def _hunyuan_video15(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _video(g, b, dtype),
        "timestep": _timestep(b).to(dtype),
        "encoder_hidden_states": _text(g, b, dtype),
        "encoder_attention_mask": _mask(b),
        "encoder_hidden_states_2": torch.randn(b, 6, 12, generator=g).to(dtype),
        "encoder_attention_mask_2": _mask(b, 6),
        "image_embeds": torch.randn(b, 3, 12, generator=g).to(dtype),
    }


def _hunyuan_image(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(b, 4, 4, 4, generator=g).to(dtype),
        "timestep": _timestep(b).to(dtype),
        "encoder_hidden_states": _text(g, b, dtype),
        "encoder_attention_mask": _mask(b),
    }


_QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (8, 4, 4),
}
_QWEN_IMAGE21 = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "context_in_dim": TEXT_DIM,
    "axes_dims_rope": (8, 4, 4),
}
_QWEN_IMAGE21_CALLS = (3 + 1, 3, 3, 3, 0)
_QWEN_IMAGE_CALLS = (3 * 2 + 1, 3 * 2, 3 * 2, 0, 3)
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

MODELS = {
    "qwen-image": Tiny("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_image([(1, 4, 4)]), _QWEN_IMAGE_CALLS),
    # Edit and Edit-Plus: the pictures to edit follow as tokens.
    "qwen-image-edit": Tiny("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_image([(1, 4, 4), (1, 2, 4), (1, 3, 3)]), _QWEN_IMAGE_CALLS),
    # Edit-2511: their tokens are modulated as of timestep 0.
    "qwen-image-edit-zero-cond-t": Tiny(
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE | {"zero_cond_t": True},
        _qwen_image([(1, 4, 4), (1, 2, 4), (1, 3, 3)]),
        _QWEN_IMAGE_CALLS,
    ),
    "qwen-image-layered": Tiny(
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE | {"use_layer3d_rope": True, "use_additional_t_cond": True},
        _qwen_image([(1, 4, 4), (1, 4, 4), (1, 4, 4)], additional_t_cond=lambda g, b, tokens, dtype: torch.arange(b) % 2),
        _QWEN_IMAGE_CALLS,
    ),
    # Inpaint: a ControlNet's samples are added between the blocks.
    "qwen-image-controlled": Tiny(
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE,
        _qwen_image(
            [(1, 4, 4)],
            controlnet_block_samples=lambda g, b, tokens, dtype: [torch.randn(b, tokens, 48, generator=g).to(dtype) for _ in range(2)],
        ),
        _QWEN_IMAGE_CALLS,
    ),
    "qwen-image-controlnet": Tiny(
        "QwenImageControlNetModel",
        _QWEN_IMAGE | {"extra_condition_channels": 4},
        _qwen_image([(1, 4, 4)], controlnet_cond=lambda g, b, tokens, dtype: torch.randn(b, tokens, 20, generator=g).to(dtype)),
        (3 * 2, 3 * 2, 3 * 2, 0, 3),
    ),
    "qwen-image-2.1": Tiny("QwenImage21Transformer2DModel", _QWEN_IMAGE21, _qwen_image21([(1, 4, 4)]), _QWEN_IMAGE21_CALLS),
    # The pictures to edit stand between the words.
    "qwen-image-2.1-edit": Tiny(
        "QwenImage21Transformer2DModel", _QWEN_IMAGE21, _qwen_image21([(1, 2, 2), (1, 4, 2), (1, 4, 4)]), _QWEN_IMAGE21_CALLS
    ),
    "qwen-image-2.1-without-causal-condition": Tiny(
        "QwenImage21Transformer2DModel", _QWEN_IMAGE21 | {"causal_condition": False}, _qwen_image21([(1, 4, 4)]), _QWEN_IMAGE21_CALLS
    ),
    "wan-t2v": Tiny("WanTransformer3DModel", _WAN, _wan, _WAN_CALLS),
    "wan-i2v": Tiny("WanTransformer3DModel", _WAN_IMAGE, _wan_image, _WAN_CALLS),
    "wan-ti2v": Tiny("WanTransformer3DModel", _WAN, _wan_per_token, _WAN_CALLS),
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
    "hunyuan-video": Tiny("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO, _hunyuan_video, _HUNYUAN_CALLS),
    "hunyuan-video-token-replace": Tiny(
        "HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO | {"image_condition_type": "token_replace"}, _hunyuan_video, _HUNYUAN_CALLS
    ),
    "hunyuan-video-framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        _HUNYUAN_VIDEO | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        _hunyuan_video_framepack,
        _HUNYUAN_CALLS,
    ),
    "hunyuan-video-1.5": Tiny(
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN | {"text_embed_2_dim": 12, "image_embed_dim": 12},
        _hunyuan_video15,
        (2 * 2 + 1, 2 * 2, 2 * 2, 0, 2),
    ),
    "hunyuan-image": Tiny(
        "HunyuanImageTransformer2DModel", _HUNYUAN | {"num_single_layers": 2, "rope_axes_dim": (8, 4)}, _hunyuan_image, _HUNYUAN_CALLS
    ),
}
MODELS = {name: model for name, model in MODELS.items() if hasattr(diffusers, model.cls)}  # some came after the oldest release
