"""Three tiny pipelines of diffusers' own classes with random weights: nothing is downloaded, the text encoders are left out."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    ModelMixin,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

HEADS, HEAD_DIM = 4, 64
ROPE_DIMS = (16, 24, 24)
LATENT_CHANNELS = 16
TEXT_TOKENS, TEXT_DIM, POOLED_DIM = 16, 64, 32
UNSCALED = {"latents_mean": [0.0] * LATENT_CHANNELS, "latents_std": [1.0] * LATENT_CHANNELS}


@dataclass(frozen=True)
class TinyPipeline:
    """``build()`` makes the pipeline, on the CPU; ``arguments()`` are those of its call, but for the size, seed and steps."""

    build: Callable[[], DiffusionPipeline]
    arguments: Callable[[], dict[str, Any]]
    size: Mapping[str, int]


def _random(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def _in_bf16(transformer: ModelMixin) -> ModelMixin:
    """The transformer in bf16 as ``from_pretrained`` loads it, which leaves some of Wan's parameters in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        return type(transformer).from_pretrained(folder, torch_dtype=torch.bfloat16)


@torch.no_grad()
def _smooth(vae: ModelMixin) -> ModelMixin:
    """Makes the random decoder draw soft shapes in full contrast: white-noise kernels would draw noise.

    Every kernel keeps one random matrix over the channels, as a blur in space and the newest tap in time; then the last convolution
    is scaled to what random latents need.
    """
    convolutions = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    for convolution in convolutions:
        *time, height, width = convolution.kernel_size
        tap = torch.zeros(*time, height, width)
        blur = {1: torch.ones(1), 3: torch.tensor([0.5, 2.0, 0.5])}
        tap[(-1,) * len(time)] = torch.outer(blur[height], blur[width])
        mixing = convolution.weight.flatten(2)[:, :, 0]
        convolution.weight.copy_(mixing.view(*mixing.shape, *[1] * tap.dim()) * tap)
    last = convolutions[-1]
    assert last.bias is not None
    picture = vae.decode(torch.randn(1, LATENT_CHANNELS, 2, 8, 8), return_dict=False)[0]
    gain = 0.3 / picture.std((3, 4)).mean((0, 2))
    last.weight.mul_(gain.view(-1, 1, 1, 1, 1))
    last.bias.sub_(picture.mean((0, 2, 3, 4))).mul_(gain)
    return vae


def _qwen_image() -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE_DIMS,
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_smooth(AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **UNSCALED)),
        text_encoder=None,
        tokenizer=None,
        transformer=_in_bf16(transformer),
    )


def _qwen_image_arguments() -> dict[str, Any]:
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
    return {"prompt_embeds": _random(TEXT_TOKENS, TEXT_DIM), "prompt_embeds_mask": mask, "true_cfg_scale": 1.0}


def _wan() -> DiffusionPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        ffn_dim=4 * HEADS * HEAD_DIM,
        num_layers=4,
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_smooth(AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1, **UNSCALED)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_in_bf16(transformer),
    )


def _wan_arguments() -> dict[str, Any]:
    return {"prompt_embeds": _random(TEXT_TOKENS, TEXT_DIM), "guidance_scale": 1.0}


def _hunyuan_video() -> DiffusionPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=4,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=ROPE_DIMS,
    )
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=_in_bf16(transformer),
        vae=_smooth(
            AutoencoderKLHunyuanVideo(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0)
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _hunyuan_video_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": _random(TEXT_TOKENS, TEXT_DIM),
        "pooled_prompt_embeds": _random(POOLED_DIM),
        "prompt_attention_mask": torch.ones(1, TEXT_TOKENS),
    }


PIPELINES = (
    TinyPipeline(_qwen_image, _qwen_image_arguments, {"height": 192, "width": 384}),
    TinyPipeline(_wan, _wan_arguments, {"height": 128, "width": 128, "num_frames": 5}),
    TinyPipeline(_hunyuan_video, _hunyuan_video_arguments, {"height": 128, "width": 128, "num_frames": 5}),
)
