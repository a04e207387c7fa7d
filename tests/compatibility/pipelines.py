"""What people call on pipelines. The pipelines are the tiny models without text encoders and, but
for its own rows, without a VAE.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from accelerate.utils import send_to_device
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import Tensor

from . import lora
from .feature import (
    DEVICE,
    DTYPE,
    FAMILIES,
    Feature,
    Observe,
    Upstream,
    calls_of,
    its_output,
    linears_called,
    load,
    weights_at_rest,
    without,
)

_PIPELINES = {
    "Qwen-Image": ("QwenImagePipeline", {"text_encoder": None, "tokenizer": None}),
    "FLUX.1": ("FluxPipeline", {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}),
    "FLUX.2": ("Flux2KleinPipeline", {"text_encoder": None, "tokenizer": None}),
    "Z-Image": ("ZImagePipeline", {"text_encoder": None, "tokenizer": None}),
    "Lumina2": ("Lumina2Pipeline", {"text_encoder": None, "tokenizer": None}),
    "Wan": ("WanPipeline", {"text_encoder": None, "tokenizer": None}),
    "HunyuanVideo": ("HunyuanVideoPipeline", {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}),
    "LTX-2": ("LTX2Pipeline", {"text_encoder": None, "tokenizer": None}),
    "SD3": (
        "StableDiffusion3Pipeline",
        {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")},
    ),
}
_PICTURES = ("Qwen-Image", "FLUX.1", "FLUX.2", "Z-Image", "Lumina2", "SD3")
_TEXT, _TEXT_DIM, _POOLED_DIM = 7, 16, 8


def pipeline(family: str, vae: Any = None) -> Any:
    """A pipeline around the tiny model of the family. Those of FLUX.2 and LTX-2 ask their VAEs for
    the scale of latents, too.
    """
    name, absent = _PIPELINES[family]
    vae = _vae(family) if vae is None and family in ("FLUX.2", "LTX-2") else vae
    parts = absent | (_ltx2_parts() if family == "LTX-2" else {})
    pipe = getattr(diffusers, name)(transformer=load(family), scheduler=_default_scheduler(family), vae=vae, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _default_scheduler(family: str) -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=family in ("Qwen-Image", "FLUX.1"))


def _family(pipe: Any) -> str:
    return next(family for family, (name, _) in _PIPELINES.items() if name == type(pipe).__name__)


def generate(pipe: Any, family: str, steps: int = 2, **more: Any) -> Tensor:
    """The latents after some steps, of video and audio in one."""
    size = {"height": 64, "width": 64} | ({} if family in _PICTURES else {"num_frames": 5})
    arguments = prompt(family) | size | {"generator": torch.Generator("cpu").manual_seed(0), "output_type": "latent"} | more
    output, *others = pipe(**arguments, num_inference_steps=steps, return_dict=False)
    return torch.cat([stream.flatten() for stream in (output, *others)]) if others else output


def prompt(family: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(DEVICE, DTYPE)

    match family:
        case "Qwen-Image":
            mask = torch.ones(1, _TEXT, dtype=torch.long, device=DEVICE)
            return {"prompt_embeds": random(_TEXT, _TEXT_DIM), "prompt_embeds_mask": mask, "true_cfg_scale": 1.0}
        case "FLUX.1":
            return {"prompt_embeds": random(_TEXT, _TEXT_DIM), "pooled_prompt_embeds": random(_POOLED_DIM)}
        case "FLUX.2":
            return {"prompt_embeds": random(_TEXT, _TEXT_DIM), "guidance_scale": 1.0}
        case "Z-Image":
            return {"prompt_embeds": [random(_TEXT, _TEXT_DIM)[0]], "guidance_scale": 0.0}
        case "Lumina2":
            mask = torch.ones(1, _TEXT, dtype=torch.long, device=DEVICE)
            return {"prompt_embeds": random(_TEXT, _TEXT_DIM), "prompt_attention_mask": mask, "guidance_scale": 1.0}
        case "Wan":
            return {"prompt_embeds": random(_TEXT, _TEXT_DIM), "guidance_scale": 1.0}
        case "LTX-2":
            mask = torch.ones(1, _TEXT, dtype=torch.long, device=DEVICE)
            scales = {f"{stream}{name}": 1.0 for stream in ("", "audio_") for name in ("guidance_scale", "modality_scale")}
            return {"prompt_embeds": random(_TEXT, _TEXT_DIM), "prompt_attention_mask": mask, **scales, "stg_scale": 0.0}
        case "SD3":
            return {"prompt_embeds": random(_TEXT, _TEXT_DIM), "pooled_prompt_embeds": random(_POOLED_DIM), "guidance_scale": 1.0}
        case _:
            mask = torch.ones(1, _TEXT, device=DEVICE)
            return {
                "prompt_embeds": random(_TEXT, _TEXT_DIM),
                "pooled_prompt_embeds": random(_POOLED_DIM),
                "prompt_attention_mask": mask,
            }


def _embeddings(family: str) -> dict[str, Tensor]:
    return {name: value for name, value in prompt(family).items() if isinstance(value, Tensor)}


def _model_offload(pipe: Any, folder: Path) -> Any:
    pipe.enable_model_cpu_offload(device=DEVICE)
    return pipe


def _sequential_offload(pipe: Any, folder: Path) -> Any:
    pipe.enable_sequential_cpu_offload(device=DEVICE)
    return pipe


def _remove_hooks(pipe: Any) -> Any:
    pipe.remove_all_hooks()
    pipe.to(DEVICE)
    return pipe


def _group_offload(pipe: Any, folder: Path) -> Any:
    pipe.enable_group_offload(onload_device=torch.device(DEVICE), offload_type="leaf_level", offload_to_disk_path=str(folder))
    return pipe


def _scheduler(pipe: Any, **shifts: float) -> Any:
    return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **shifts)


def _another_scheduler(pipe: Any, folder: Path) -> Any:
    """Of another class where the pipeline takes one."""
    if isinstance(pipe, diffusers.WanPipeline):
        pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    else:
        pipe.scheduler = _scheduler(pipe, shift=5.0, base_shift=2.0, max_shift=3.0)
    return pipe


def _reset_scheduler(pipe: Any) -> Any:
    pipe.scheduler = _default_scheduler(_family(pipe))
    return pipe


def _damped_at_each_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] * 0.5}


def _with_callback(pipe: Any, family: str) -> Tensor:
    return generate(pipe, family, callback_on_step_end=_damped_at_each_step)


def _from_pipe(pipe: Any, folder: Path) -> Any:
    other = type(pipe).from_pipe(pipe, torch_dtype=DTYPE, scheduler=_scheduler(pipe, shift=5.0, base_shift=2.0, max_shift=3.0))
    other.set_progress_bar_config(disable=True)
    return other


def _same(pipe: Any, folder: Path) -> Any:
    return pipe


def _two_share(pipe: Any, family: str) -> Tensor:
    """Two pipelines around one transformer."""
    other = type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    return torch.stack([generate(pipe, family), generate(other, family)])


def _beside_others(pipe: Any, family: str) -> Tensor:
    """Pipelines of the other families in the same process, which nobody patched, take turns with
    this one.
    """
    others = [(name, pipeline(name)) for name in _PIPELINES if name != family]
    before = [generate(other, name).flatten() for name, other in others]
    latents = generate(pipe, family).flatten()
    after = [generate(other, name).flatten() for name, other in others]
    return torch.cat([latents, *before, *after])


def _lora_weights(pipe: Any, folder: Path) -> Any:
    donor = lora.add(load(_family(pipe)), "a", 1)
    from peft.utils import get_peft_model_state_dict

    type(pipe).save_lora_weights(str(folder), transformer_lora_layers=get_peft_model_state_dict(donor, adapter_name="a"))
    pipe.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors", adapter_name="a")
    return pipe


def _unload_lora(pipe: Any) -> Any:
    pipe.unload_lora_weights()
    return pipe


def _on_the_cpu(family: str) -> Any:
    return pipeline(family).to("cpu")


def _where_it_is(pipe: Any, family: str) -> Tensor:
    return generate(pipe, family, **send_to_device(prompt(family), pipe.device))


def _to_cuda(pipe: Any, folder: Path) -> Any:
    return pipe.to("cuda")


def _to_cpu(pipe: Any) -> Any:
    return pipe.to("cpu")


_WAN_VAE = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 0, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def _picture_vae(channels: int, tile: int) -> dict[str, Any]:
    return {
        "latent_channels": channels,
        "block_out_channels": (4, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 1,
        "shift_factor": 0.0,
        "sample_size": tile,
    }


_VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen-Image": ("AutoencoderKLQwenImage", _WAN_VAE),
    "FLUX.1": ("AutoencoderKL", _picture_vae(1, 48)),
    "FLUX.2": ("AutoencoderKLFlux2", {name: value for name, value in _picture_vae(1, 48).items() if name != "shift_factor"}),
    "Z-Image": ("AutoencoderKL", _picture_vae(16, 48)),
    "Lumina2": ("AutoencoderKL", _picture_vae(4, 48)),
    "Wan": ("AutoencoderKLWan", _WAN_VAE),
    "HunyuanVideo": (
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": (4, 8, 8, 8), "layers_per_block": 0, "norm_num_groups": 1},
    ),
    "LTX-2": (
        "AutoencoderKLLTX2Video",
        {
            "latent_channels": 4,
            "block_out_channels": (8,),
            "decoder_block_out_channels": (8,),
            "layers_per_block": (1,),
            "decoder_layers_per_block": (1, 1),
            "spatio_temporal_scaling": (True,),
            "decoder_spatio_temporal_scaling": (True,),
            "decoder_inject_noise": (False, False),
            "downsample_type": ("spatial",),
            "upsample_residual": (False,),
            "upsample_factor": (1,),
        },
    ),
    "SD3": ("AutoencoderKL", _picture_vae(4, 32)),
}


def _ltx2_parts() -> dict[str, Any]:
    """What LTX-2's pipeline has besides: the VAE and vocoder of the audio, and what makes each
    stream's text.
    """
    connector = {"num_attention_heads": 1, "attention_head_dim": _TEXT_DIM, "num_layers": 1, "num_learnable_registers": None}
    torch.manual_seed(0)
    parts = {
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        ),
        "vocoder": LTX2Vocoder(
            in_channels=2 * 8,
            hidden_channels=32,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
        "connectors": LTX2TextConnectors(
            caption_channels=_TEXT_DIM,
            text_proj_in_factor=1,
            **{f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in connector.items()},
            connector_rope_base_seq_len=32,
            rope_type="split",
        ),
    }
    return {name: part.to(DEVICE, DTYPE if name == "connectors" else torch.float32).eval() for name, part in parts.items()}


def _vae(family: str) -> Any:
    name, config = _VAES[family]
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**config)
    # bf16 convolutions are slow on the CPU, but some pipelines cast nothing for the VAE.
    return vae.to(DEVICE, DTYPE if family in ("FLUX.1", "FLUX.2", "Z-Image", "Lumina2", "SD3") else torch.float32).eval()


def _with_vae(family: str) -> Any:
    return pipeline(family, _vae(family))


def _decoded(pipe: Any, family: str) -> Tensor:
    """Two decoded pictures or videos; LTX-2's pipeline wants the embeddings of both."""
    if family == "LTX-2":
        return generate(pipe, family, output_type="pt", **{name: torch.cat([t, t]) for name, t in _embeddings(family).items()})
    number = "num_images_per_prompt" if family in _PICTURES else "num_videos_per_prompt"
    return generate(pipe, family, output_type="pt", **{number: 2})


def _vae_calls(method: str) -> Observe:
    return lambda pipe, run: calls_of(type(pipe.vae), method)(pipe, run)


def _tile(pipe: Any, folder: Path) -> Any:
    if isinstance(pipe.vae, diffusers.AutoencoderKL | diffusers.AutoencoderKLFlux2):  # whose tiles have the size of its samples
        pipe.vae.enable_tiling()
        return pipe
    tiles = {f"tile_sample_{size}_{side}": pixels for size, pixels in (("min", 48), ("stride", 32)) for side in ("height", "width")}
    pipe.vae.enable_tiling(**tiles)
    return pipe


def _do_not_tile(pipe: Any) -> Any:
    pipe.vae.disable_tiling()
    return pipe


def _slice(pipe: Any, folder: Path) -> Any:
    pipe.vae.enable_slicing()
    return pipe


def _do_not_slice(pipe: Any) -> Any:
    pipe.vae.disable_slicing()
    return pipe


def _cache_dit(pipe: Any, folder: Path) -> Any:
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=10.0, max_warmup_steps=1)
    return cache_dit.enable_cache(pipe, cache_config=config)


def _feature(name: str, apply: Callable[[Any, Path], Any], observe: Any, undo: Any = None, **more: Any) -> Feature:
    return Feature(name, apply, observe, undo, run=generate, load=pipeline, **more)


FEATURES = (
    _feature("`enable_model_cpu_offload`", _model_offload, calls_of(CpuOffload, "pre_forward"), _remove_hooks),
    _feature(
        "`enable_sequential_cpu_offload`",
        _sequential_offload,
        calls_of(AlignDevicesHook, "pre_forward"),
        _remove_hooks,
        upstream=dict.fromkeys(FAMILIES, Upstream("invalid combination", "diffusers offloads pipelines to an accelerator only", "cpu")),
    ),
    _feature(
        "`enable_group_offload`, leaf level, disk",
        _group_offload,
        calls_of(diffusers.hooks.group_offloading.ModuleGroup, "onload_"),
        families=without("FLUX.2"),
        upstream={"LTX-2": Upstream("must match the size", "parts of a pipeline that have the same names overwrite each other's files")},
        note="upstream offloads the statistics of FLUX.2's VAE, which its pipeline reads itself",
    ),
    _feature("`load_lora_weights`, `unload_lora_weights`", _lora_weights, its_output, _unload_lora),
    _feature("another scheduler", _another_scheduler, its_output, _reset_scheduler),
    _feature("`from_pipe` with another scheduler", _from_pipe, its_output),
    _feature("`callback_on_step_end`", _same, its_output, run_with=_with_callback),
    _feature("two pipelines that share a transformer", _same, its_output, run_with=_two_share, passes=2),
    _feature("unpatched pipelines of the other families beside it", _same, its_output, run_with=_beside_others),
    Feature('`pipe.to("cuda")`', _to_cuda, weights_at_rest, _to_cpu, run=_where_it_is, load=_on_the_cpu, gpus=1),
    Feature("`vae.enable_tiling`", _tile, _vae_calls("tiled_decode"), _do_not_tile, run=_decoded, load=_with_vae),
    Feature("`vae.enable_slicing`", _slice, _vae_calls("_decode"), _do_not_slice, run=_decoded, load=_with_vae),
    Feature(
        "cache-dit's `enable_cache`",
        _cache_dit,
        linears_called,
        run=functools.partial(generate, steps=6),
        load=pipeline,
        fused="some",
        upstream={"LTX-2": Upstream("unexpected keyword argument 'sigma'", "cache-dit's forward of LTX-2's model is an older one")},
        needs=("cache_dit",),
    ),
)
