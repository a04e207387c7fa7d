"""Modular pipelines: made of blocks around a model that exists already."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModularPipeline
from diffusers.guiders import (
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.hunyuan_video1_5.modular_blocks_hunyuan_video1_5 import HunyuanVideo15CoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from support import tiny
from torch import Tensor, nn

from . import pipelines
from .caches import NOT_REGISTERED
from .feature import DEVICE, DTYPE, FAMILIES, Feature, calls_of, forward, linears_called, load

_BLOCKS = {
    "Qwen-Image": QwenImageCoreDenoiseStep,
    "FLUX.1": FluxCoreDenoiseStep,
    "Wan": WanCoreDenoiseStep,
    "HunyuanVideo": HunyuanVideo15CoreDenoiseStep,
}
_STEPS = 2
_NOTE = "of HunyuanVideo diffusers has modular blocks for 1.5 only, of SD3 none"
_HUNYUAN = "hunyuan-video-1.5"
_CHANNELS = 4  # of HunyuanVideo-1.5's latents; its model also gets those of an image and their mask


def _load(family: str) -> Any:
    if family != "HunyuanVideo":
        return load(family)
    torch.manual_seed(0)
    model: Any = diffusers.HunyuanVideo15Transformer3DModel(**tiny.MODELS[_HUNYUAN].config | {"in_channels": 2 * _CHANNELS + 1})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(DEVICE, DTYPE).eval()


def _forward(model: nn.Module, family: str) -> Tensor:
    if family != "HunyuanVideo":
        return forward(model, family)
    arguments = tiny.inputs(_HUNYUAN, 2, DTYPE)
    latents = arguments["hidden_states"]
    arguments["hidden_states"] = torch.cat([latents, latents, latents[:, :1]], dim=1)
    return tiny.run(model, {name: t.to(DEVICE) for name, t in arguments.items()})


def _pipeline(model: Any) -> Any:
    name = type(model).__name__
    family = "FLUX.1" if "Flux" in name else next(family for family in _BLOCKS if family.replace("-", "") in name)
    pipe = _BLOCKS[family]().init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=family in ("Qwen-Image", "FLUX.1"))
    pipe.update_components(transformer=model, scheduler=scheduler, guider=_no_guidance())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _no_guidance() -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(guidance_scale=1.0)


def _load_pipeline(family: str) -> Any:
    return _pipeline(_load(family))


def _guided(make: Callable[[str], Any]) -> Callable[[Any, Path], Any]:
    """A guider runs the model several times in a step, some of them with hooks that it adds before
    and removes after.
    """

    def apply(pipe: Any, folder: Path) -> Any:
        pipe.update_components(guider=make("blocks" if hasattr(pipe.transformer, "blocks") else "transformer_blocks"))
        return pipe

    return apply


def _skip_layers(fqn: str) -> SkipLayerGuidance:
    skipped = LayerSkipConfig(indices=[1], fqn=fqn, skip_attention=False)
    return SkipLayerGuidance(guidance_scale=2.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_config=[skipped])


def _perturb(fqn: str) -> PerturbedAttentionGuidance:
    layers = LayerSkipConfig(indices=[1], fqn=fqn, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return PerturbedAttentionGuidance(
        guidance_scale=2.0, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0, perturbed_guidance_config=layers
    )


def _blur(fqn: str) -> SmoothedEnergyGuidance:
    layers = SmoothedEnergyGuidanceConfig(indices=[1], fqn=fqn)
    return SmoothedEnergyGuidance(guidance_scale=2.0, seg_blur_sigma=1.0, seg_guidance_config=layers)


def _worse(fqn: str) -> AutoGuidance:
    layers = LayerSkipConfig(indices=[1], fqn=fqn, skip_attention=False)
    return AutoGuidance(guidance_scale=2.0, auto_guidance_config=layers)


def _skip_nothing(pipe: Any) -> Any:
    pipe.update_components(guider=_no_guidance())
    return pipe


def _generate(pipe: Any, family: str) -> Tensor:
    prompt = _prompt(family)
    negative = {f"negative_{name}": -t if t.is_floating_point() else t for name, t in prompt.items() if family in _GUIDED}
    arguments = prompt | negative | _latents(family) | {"generator": torch.Generator("cpu").manual_seed(0)}
    return pipe(**arguments, num_inference_steps=_STEPS, output="latents")


def _prompt(family: str) -> dict[str, Tensor]:
    if family != "HunyuanVideo":
        return {name: t for name, t in pipelines.prompt(family).items() if "prompt" in name}
    inputs = tiny.inputs(_HUNYUAN, 1, DTYPE)
    names = {"prompt_embeds": "encoder_hidden_states", "prompt_embeds_mask": "encoder_attention_mask"}
    return {f"{name}{which}": inputs[f"{theirs}{which}"].to(DEVICE) for name, theirs in names.items() for which in ("", "_2")}


def _latents(family: str) -> dict[str, Any]:
    if family in ("Qwen-Image", "FLUX.1"):
        return {"height": 64, "width": 64}
    name = FAMILIES[family] if family == "Wan" else _HUNYUAN
    return {"latents": tiny.inputs(name, 1, DTYPE)["hidden_states"].to(DEVICE)}


def _around(model: nn.Module, folder: Path) -> Any:
    return _pipeline(model)


def _model(pipe: Any) -> Any:
    return pipe.transformer


_GUIDED = tuple(family for family in _BLOCKS if family != "FLUX.1")


def _guider(name: str, make: Callable[[str], Any], **more: Any) -> Feature:
    return Feature(
        f"`{name}` in a modular pipeline",
        _guided(make),
        linears_called,
        _skip_nothing,
        run=_generate,
        load=_load_pipeline,
        fused="any",
        families=_GUIDED,
        note=f"FLUX.1's modular blocks have no guider; {_NOTE}",
        **more,
    )


FEATURES = (
    Feature(
        "a modular pipeline around the model",
        _around,
        calls_of(ModularPipeline, "__call__"),
        _model,
        run=_forward,
        run_with=_generate,
        load=_load,
        passes=_STEPS,
        families=tuple(_BLOCKS),
        note=_NOTE,
    ),
    _guider("ClassifierFreeGuidance", lambda fqn: ClassifierFreeGuidance(guidance_scale=2.0)),
    _guider("AutoGuidance", _worse),
    _guider("SkipLayerGuidance", _skip_layers),
    _guider("SmoothedEnergyGuidance", _blur),
    _guider("PerturbedAttentionGuidance", _perturb, upstream=dict.fromkeys(("Wan", "HunyuanVideo"), NOT_REGISTERED)),
)
