"""Tiny pipelines of the families that have no trained one in ``examples/digits``: with random
weights, so that what they draw means nothing, and is still the same with ditnorm and without.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from .families import HEAD_DIM, HEADS, IMAGE, POOLED_DIM, TEXT_DIM, Prompts, TinyPipeline, mask, save


@contextmanager
def checkpoint(name: str) -> Iterator[str]:
    """The folder of a pipeline with random weights, for as long as the context lasts."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save(UNTRAINED[name].build(), Path(folder))
        yield folder


_VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (4, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 1,
}
_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "joint_attention_dim": TEXT_DIM,
}


def _flux() -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(**_FLUX, pooled_projection_dim=POOLED_DIM, guidance_embeds=True, axes_dims_rope=(8, 12, 12))
    vae = AutoencoderKL(**_VAE, scaling_factor=1.0, shift_factor=0.0)
    absent = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2"))
    return FluxPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **absent)


def _flux_arguments(prompts: Prompts) -> dict[str, Any]:
    return dict(prompts)


def _flux2() -> DiffusionPipeline:
    """FLUX.2 Klein."""
    transformer = Flux2Transformer2DModel(**_FLUX, guidance_embeds=False, axes_dims_rope=(8, 8, 8, 8))
    absent = dict.fromkeys(("text_encoder", "tokenizer"))
    return Flux2KleinPipeline(
        transformer=transformer, vae=AutoencoderKLFlux2(**_VAE), scheduler=FlowMatchEulerDiscreteScheduler(), is_distilled=True, **absent
    )


def _flux2_arguments(prompts: Prompts) -> dict[str, Any]:
    return {"prompt_embeds": prompts["prompt_embeds"], "guidance_scale": 1.0}


def _sd3() -> DiffusionPipeline:
    """With a second attention in the first block, as Medium has it."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=POOLED_DIM,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(**_VAE, scaling_factor=1.0, shift_factor=0.0)
    encoders = (f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    absent = dict.fromkeys(encoders)
    return StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **absent)


def _sd3_arguments(prompts: Prompts) -> dict[str, Any]:
    return {**prompts, "guidance_scale": 1.0}


def _z_image() -> DiffusionPipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=HEADS * HEAD_DIM,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[HEAD_DIM // 2, HEAD_DIM // 4, HEAD_DIM // 4],
        axes_lens=[256, 64, 64],
    )
    vae = AutoencoderKL(**_VAE, scaling_factor=1.0, shift_factor=0.0)
    absent = dict.fromkeys(("text_encoder", "tokenizer"))
    return ZImagePipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **absent)


def _z_image_arguments(prompts: Prompts) -> dict[str, Any]:
    return {"prompt_embeds": list(prompts["prompt_embeds"]), "guidance_scale": 0.0}


def _lumina2() -> DiffusionPipeline:
    """With fewer heads of key and value."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=96,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT_DIM,
    )
    vae = AutoencoderKL(**_VAE, scaling_factor=1.0, shift_factor=0.0)
    absent = dict.fromkeys(("text_encoder", "tokenizer"))
    return Lumina2Pipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **absent)


def _lumina2_arguments(prompts: Prompts) -> dict[str, Any]:
    return {"prompt_embeds": prompts["prompt_embeds"], "prompt_attention_mask": mask(prompts), "guidance_scale": 1.0}


def _ltx2() -> DiffusionPipeline:
    """Two frames of video, and sound."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=64,
        cross_attention_dim=128,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=32,
        audio_cross_attention_dim=64,
        num_layers=2,
        caption_channels=TEXT_DIM,
        rope_type="split",
    )
    connector: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": TEXT_DIM, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_DIM,
        text_proj_in_factor=1,
        **{f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in connector.items()},
        connector_rope_base_seq_len=32,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
    )
    audio_vae = AutoencoderKLLTX2Audio(base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8)
    vocoder = LTX2Vocoder(
        in_channels=2 * 8,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer"))
    parts: dict[str, Any] = {"vae": vae, "audio_vae": audio_vae, "connectors": connectors, "vocoder": vocoder}
    return LTX2Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **absent)


def _ltx2_arguments(prompts: Prompts) -> dict[str, Any]:
    scales = {f"{prefix}{name}": 1.0 for prefix in ("", "audio_") for name in ("guidance_scale", "modality_scale")}
    without = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "spatio_temporal_guidance_blocks": None}
    return {"prompt_embeds": prompts["prompt_embeds"], "prompt_attention_mask": mask(prompts), **scales, **without}


UNTRAINED = {
    pipeline.name: pipeline
    for pipeline in (
        TinyPipeline("flux", "FluxPipeline", _flux, IMAGE, _flux_arguments),
        TinyPipeline("flux2", "Flux2KleinPipeline", _flux2, IMAGE, _flux2_arguments),
        TinyPipeline("z-image", "ZImagePipeline", _z_image, IMAGE, _z_image_arguments),
        TinyPipeline("lumina2", "Lumina2Pipeline", _lumina2, IMAGE, _lumina2_arguments),
        TinyPipeline("sd3", "StableDiffusion3Pipeline", _sd3, IMAGE, _sd3_arguments),
        TinyPipeline("ltx2", "LTX2Pipeline", _ltx2, {"height": 32, "width": 32, "num_frames": 5}, _ltx2_arguments),
    )
}
