"""The configurations of published models, and inputs of the size that their pipelines give them by default: data, no weights.

Configurations: of Qwen-Image, Qwen-Image 2.1 and HunyuanVideo, the defaults of diffusers' classes; of Wan2.1-1.3B, A14B and
HunyuanVideo-1.5, diffusers' ``scripts/convert_*_to_diffusers.py``; of TI2V-5B, ``wan/configs/wan_ti2v_5B.py`` of Wan's own repository.
``source`` names the checkpoint that a configuration stands for.

Token counts: a latent frame every 4 frames (the first alone), latent pixels of 8 x 8 (16 x 16 for TI2V-5B and HunyuanVideo-1.5),
2 x 2 of them a token (1 for HunyuanVideo-1.5). Qwen-Image 2.1: latent pixels of 16 x 16, each a token.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16

Arguments = Callable[["RealModel", Tensor, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class RealModel:
    """One model at one size."""

    title: str
    source: str
    cls: str
    config: Mapping[str, Any]
    """Only what differs from the defaults of ``cls``, and the numbers of layers."""
    measured: Mapping[str, int]
    """Layers to measure: all, or so many that a step takes a few seconds on an H200."""
    latents: tuple[int, ...]
    """Shape of what the model denoises."""
    arguments: Arguments
    """The forward's arguments for latents and a timestep (0 to 1000, 0-d)."""

    @property
    def tokens(self) -> int:
        """Latent tokens, without the text."""
        if len(self.latents) == 3:
            return self.latents[1]
        frames, height, width = self.latents[2:]
        patch = 1 if self.cls == "HunyuanVideo15Transformer3DModel" else 2
        return frames * (height // patch) * (width // patch)

    def layers(self, each: int | None) -> dict[str, int]:
        """The layers to build: ``each`` of every kind, or those to measure."""
        return dict(self.measured) if each is None else {kind: min(each, self.config[kind]) for kind in self.measured}

    def noise(self, device: torch.device) -> Tensor:
        """The latents that denoising starts from, the same every time."""
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(self.latents, generator=generator, device=device).to(DTYPE)

    def velocity(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """What ``model`` makes of the latents. Qwen-Image 2.1 returns those of the text before them."""
        output: Tensor = model(**arguments, return_dict=False)[0]
        return output[:, -self.tokens :] if len(self.latents) == 3 else output

    def build(self, layers: Mapping[str, int], device: torch.device) -> nn.Module:
        """The model with random weights, in the dtypes that ``from_pretrained(torch_dtype=torch.bfloat16)`` gives its parameters."""
        cls = getattr(diffusers, self.cls)
        default = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(DTYPE)
            with device:
                model = cls(**{**self.config, **layers})
        finally:
            torch.set_default_dtype(default)
        kept = set(cls._keep_in_fp32_modules or ())
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model.eval().requires_grad_(False)


@functools.lru_cache(maxsize=8)
def _noise(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(*shape, generator=generator, device=device).to(DTYPE)


def _random(like: Tensor, *shape: int) -> Tensor:
    """Noise made once: a step isn't to be timed with it."""
    return _noise(like.device, *shape)


def _ones(like: Tensor, *shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long, device=like.device)


def _qwen_image(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    side = int(model.tokens**0.5)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": _random(latents, 1, 128, model.config["joint_attention_dim"]),
        "encoder_hidden_states_mask": _ones(latents, 1, 128),
        "timestep": timestep.to(latents.dtype).view(1) / 1000,
        "img_shapes": [[(1, side, side)]],
    }


def _qwen_image21(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    side = int(model.tokens**0.5)
    words, slots = (torch.full((1, n), value, device=latents.device) for n, value in ((128, False), (model.tokens // 4, True)))
    return {
        "hidden_states": latents,
        "encoder_hidden_states": _random(latents, 1, 128, model.config["context_in_dim"]),
        "encoder_hidden_states_mask": ~words,
        "timestep": timestep.to(latents.dtype).view(1) / 1000,
        "img_shapes": [[(1, side, side)]],
        "img_mask": torch.cat([words, slots], dim=1),
    }


def _wan(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": _random(latents, 1, 512, model.config["text_dim"]),
        "timestep": timestep.view(1),
    }


def _wan_per_token(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return _wan(model, latents, timestep) | {"timestep": timestep.expand(1, model.tokens)}


def _hunyuan_video(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timestep.to(latents.dtype).view(1),
        "encoder_hidden_states": _random(latents, 1, 256, model.config["text_embed_dim"]),
        "encoder_attention_mask": _ones(latents, 1, 256),
        "pooled_projections": _random(latents, 1, model.config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 6000.0, dtype=latents.dtype, device=latents.device),
    }


def _hunyuan_video15(model: RealModel, latents: Tensor, timestep: Tensor) -> dict[str, Any]:
    condition = latents.new_zeros(1, latents.shape[1] + 1, *latents.shape[2:])  # text to video: no first frame, an empty mask
    return {
        "hidden_states": torch.cat([latents, condition], dim=1),
        "timestep": timestep.to(latents.dtype).view(1),
        "encoder_hidden_states": _random(latents, 1, 1000, model.config["text_embed_dim"]),
        "encoder_attention_mask": _ones(latents, 1, 1000),
        "encoder_hidden_states_2": _random(latents, 1, 256, model.config["text_embed_2_dim"]),
        "encoder_attention_mask_2": _ones(latents, 1, 256),
        "image_embeds": latents.new_zeros(1, 729, model.config["image_embed_dim"]),
    }


_QWEN_IMAGE = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584}
_QWEN_IMAGE21 = {"num_layers": 32, "num_attention_heads": 32, "attention_head_dim": 128, "context_in_dim": 4096}
_WAN = {"attention_head_dim": 128, "text_dim": 4096}
_WAN_1_3B = _WAN | {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
_WAN_5B = _WAN | {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_WAN_A14B = _WAN | {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
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

MODELS = {
    "qwen-image": RealModel(
        "Qwen-Image 1024x1024",
        "Qwen/Qwen-Image",
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE,
        {"num_layers": 60},
        (1, 4096, 64),
        _qwen_image,
    ),
    "qwen-image-2.1": RealModel(
        "Qwen-Image 2.1 1024x1024",
        "Qwen/Qwen-Image-2.1",
        "QwenImage21Transformer2DModel",
        _QWEN_IMAGE21,
        {"num_layers": 32},
        (1, 4096, 64),
        _qwen_image21,
    ),
    "wan2.1-1.3b": RealModel(
        "Wan2.1-1.3B 832x480x81",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanTransformer3DModel",
        _WAN_1_3B,
        {"num_layers": 30},
        (1, 16, 21, 60, 104),
        _wan,
    ),
    "wan2.2-ti2v-5b": RealModel(
        "Wan2.2-TI2V-5B 1280x704x121",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "WanTransformer3DModel",
        _WAN_5B,
        {"num_layers": 30},
        (1, 48, 31, 44, 80),
        _wan_per_token,
    ),
    "wan2.2-a14b": RealModel(
        "Wan2.2-A14B 1280x720x81",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "WanTransformer3DModel",
        _WAN_A14B,
        {"num_layers": 8},
        (1, 16, 21, 90, 160),
        _wan,
    ),
    "hunyuan-video-480p": RealModel(
        "HunyuanVideo 848x480x65",
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN_VIDEO,
        {"num_layers": 20, "num_single_layers": 40},
        (1, 16, 17, 60, 106),
        _hunyuan_video,
    ),
    "hunyuan-video-720p": RealModel(
        "HunyuanVideo 1280x720x129",
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN_VIDEO,
        {"num_layers": 2, "num_single_layers": 4},
        (1, 16, 33, 90, 160),
        _hunyuan_video,
    ),
    "hunyuan-video-1.5": RealModel(
        "HunyuanVideo-1.5 848x480x121",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN_VIDEO15,
        {"num_layers": 8},
        (1, 32, 31, 30, 53),
        _hunyuan_video15,
    ),
}
