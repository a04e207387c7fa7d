"""Tiny pipelines of diffusers' own classes that draw handwritten digits; the trained ones lie in
``examples/digits``.

Their latents are the digits' pixels, the VAE only enlarges them (``vae.py``). In the place of a
text encoder is a table of prompt embeddings, a row for each digit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import dataset
from .vae import set_weights

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
PROMPTS = "prompts.safetensors"
HEADS, HEAD_DIM = 3, 32
TEXT_TOKENS, TEXT_DIM, POOLED_DIM = 2, 32, 32
STEPS = 20

Prompts = Mapping[str, Tensor]
"""``prompt_embeds`` ``[B, 2, 32]`` and, for HunyuanVideo, ``pooled_prompt_embeds`` ``[B, 32]``."""


@dataclass(frozen=True)
class TinyPipeline:
    """A tiny pipeline of diffusers' own classes."""

    name: str
    pipeline: str
    """The name of its class."""
    build: Callable[[], DiffusionPipeline]
    """Makes it with random weights in the transformer, in float32."""
    size: Mapping[str, int]
    """Size arguments of the pipeline's call, in pixels and frames."""
    arguments: Callable[[Prompts], dict[str, Any]]
    """Arguments of the pipeline's call for these prompts."""

    def call_arguments(self, labels: Sequence[int], pipe: DiffusionPipeline, folder: Path) -> dict[str, Any]:
        """Arguments with which the pipeline of ``folder`` draws the digits ``labels``, but for seed
        and steps.
        """
        dtype, device = pipe.transformer.dtype, pipe._execution_device
        prompts = {name: table[list(labels)].to(device, dtype) for name, table in load_file(folder / PROMPTS).items()}
        return {**self.arguments(prompts), **self.size}


@dataclass(frozen=True)
class Family(TinyPipeline):
    """One that is trained to draw digits."""

    latents: Callable[[], tuple[Tensor, Tensor]]
    """The training data: latents ``[N, 1, F, H, W]`` and labels ``[N]``."""
    velocity: Callable[[ModelMixin, Tensor, Tensor, Prompts], Tensor]
    """What the transformer makes of noisy latents ``[B, 1, F, H, W]`` at timesteps ``[B]``, 0 to
    1000: the velocity, of the same shape.
    """

    @property
    def folder(self) -> Path:
        """Where this repository has the trained pipeline."""
        return FOLDER / self.name


def draw(family: Family, folder: Path, pipe: DiffusionPipeline, labels: Sequence[int], steps: int) -> Tensor:
    """Final latents ``[N, 1, F, 8, W]``, on the CPU, of the digits ``labels``, drawn by the
    pipeline of ``folder``.
    """
    (latents,) = pipe(
        **family.call_arguments(labels, pipe, folder),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        return_dict=False,
    )
    if latents.dim() == 3:
        latents = QwenImagePipeline._unpack_latents(latents, family.size["height"], family.size["width"], dataset.SIDE)
    return latents.cpu()


def share_read(family: Family, folder: Path, pipe: DiffusionPipeline, each: int = 20) -> float:
    """The share, 0 to 1, of ``each`` times ten drawn digits that the classifier reads correctly, of
    videos in the first and last frame.
    """
    labels = torch.arange(dataset.CLASSES).repeat(each)
    read = dataset.read(draw(family, folder, pipe, labels.tolist(), steps=10))
    return (read == labels[:, None]).all(1).float().mean().item()


def prompt_table() -> dict[str, Tensor]:
    """Random embeddings of the ten digits; the models learn what they mean."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"prompt_embeds": (dataset.CLASSES, TEXT_TOKENS, TEXT_DIM), "pooled_prompt_embeds": (dataset.CLASSES, POOLED_DIM)}
    return {name: torch.randn(*shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline and the prompts in bf16, for :func:`loading.load`. Its models become
    bf16.
    """
    for model in (pipe.transformer, pipe.vae):
        nn.Module.to(model, torch.bfloat16)
    pipe.save_pretrained(folder)
    save_file({name: table.bfloat16() for name, table in prompt_table().items()}, folder / PROMPTS)


def _qwen_image() -> DiffusionPipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(8, 12, 12),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=set_weights(AutoencoderKLQwenImage(**_WAN_VAE)),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


def _qwen_image_velocity(transformer: ModelMixin, noisy: Tensor, timestep: Tensor, prompts: Prompts) -> Tensor:
    batch, channels, _, height, width = noisy.shape
    packed = transformer(
        hidden_states=QwenImagePipeline._pack_latents(noisy, batch, channels, height, width),
        timestep=timestep / 1000,
        encoder_hidden_states=prompts["prompt_embeds"],
        encoder_hidden_states_mask=mask(prompts),
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(packed, height * dataset.SIDE, width * dataset.SIDE, dataset.SIDE)


def _qwen_image_arguments(prompts: Prompts) -> dict[str, Any]:
    return {"prompt_embeds": prompts["prompt_embeds"], "prompt_embeds_mask": mask(prompts), "true_cfg_scale": 1.0}


def _wan() -> DiffusionPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=1,
        out_channels=1,
        text_dim=TEXT_DIM,
        ffn_dim=4 * HEADS * HEAD_DIM,
        num_layers=6,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=set_weights(AutoencoderKLWan(**_WAN_VAE)),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )


def _wan_velocity(transformer: ModelMixin, noisy: Tensor, timestep: Tensor, prompts: Prompts) -> Tensor:
    return transformer(noisy, timestep, encoder_hidden_states=prompts["prompt_embeds"], return_dict=False)[0]


def _wan_arguments(prompts: Prompts) -> dict[str, Any]:
    return {"prompt_embeds": prompts["prompt_embeds"], "guidance_scale": 1.0}


def _hunyuan_video() -> DiffusionPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=1,
        out_channels=1,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=False,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(8, 12, 12),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=1,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=0,
        norm_num_groups=1,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=set_weights(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _hunyuan_video_velocity(transformer: ModelMixin, noisy: Tensor, timestep: Tensor, prompts: Prompts) -> Tensor:
    return transformer(
        hidden_states=noisy,
        timestep=timestep,
        encoder_hidden_states=prompts["prompt_embeds"],
        encoder_attention_mask=mask(prompts),
        pooled_projections=prompts["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


def _hunyuan_video_arguments(prompts: Prompts) -> dict[str, Any]:
    return {**prompts, "prompt_attention_mask": mask(prompts)}


def mask(prompts: Prompts) -> Tensor:
    """Of the prompts' tokens, ``[B, 2]``: all are valid."""
    return torch.ones(prompts["prompt_embeds"].shape[:2], dtype=torch.long, device=prompts["prompt_embeds"].device)


_WAN_VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 1,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 0,
    "latents_mean": [0.0],
    "latents_std": [1.0],
}
IMAGE = {"height": dataset.SIDE * dataset.SIDE, "width": dataset.SIDE * dataset.SIDE}
_VIDEO = {"height": dataset.SIDE * dataset.SIDE, "width": dataset.SIDE * dataset.WIDTH, "num_frames": dataset.FRAMES}

FAMILIES = {
    family.name: family
    for family in (
        Family("qwen-image", "QwenImagePipeline", _qwen_image, IMAGE, _qwen_image_arguments, dataset.images, _qwen_image_velocity),
        Family("wan", "WanPipeline", _wan, _VIDEO, _wan_arguments, dataset.videos, _wan_velocity),
        Family(
            "hunyuan-video",
            "HunyuanVideoPipeline",
            _hunyuan_video,
            _VIDEO,
            _hunyuan_video_arguments,
            dataset.videos,
            _hunyuan_video_velocity,
        ),
    )
}
