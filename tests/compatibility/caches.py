"""The caches of ``diffusers.hooks``, and layers that are skipped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.hooks.hooks import HookRegistry, StateManager
from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig, _apply_smoothed_energy_guidance_hook
from torch import Tensor, nn

from .feature import Feature, Upstream, calls_of, forward, its_output, linears_called, without

STEPS = 6
_step = 0


def _run(model: nn.Module, family: str) -> Tensor:
    """Several steps of one generation, as pipelines make them."""
    global _step
    outputs = []
    for _step in range(STEPS):
        with model.cache_context("cond", step_index=_step, sigma=1 - _step / STEPS, num_inference_steps=STEPS):  # type: ignore[operator]
            outputs.append(forward(model, family, step=_step))
    model._reset_stateful_cache()  # type: ignore[operator]
    return torch.cat(outputs)


def _timestep() -> int:
    return 1000 - 1000 * _step // STEPS


def _cache(config: Callable[[], Any]) -> Callable[[nn.Module, Path], nn.Module]:
    def apply(model: nn.Module, folder: Path) -> nn.Module:
        model.enable_cache(config())  # type: ignore[operator]
        return model

    return apply


def _disable(model: nn.Module) -> nn.Module:
    model.disable_cache()  # type: ignore[operator]
    return model


def _first_block() -> Any:
    return diffusers.FirstBlockCacheConfig(threshold=10.0)


def _mag_cache() -> Any:
    return diffusers.MagCacheConfig(threshold=10.0, mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, retention_ratio=0.2)


def _taylor_seer() -> Any:
    return diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r".*blocks\.\d+\.attn\d?"])


def _pyramid() -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=_timestep,
    )


def _faster_cache() -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 600),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=_timestep,
        is_guidance_distilled=True,
        tensor_format="BCFHW",
    )


def _sea_cache() -> Any:
    return diffusers.SeaCacheConfig(threshold=10.0, raw_vision_callback=_latents)


def _latents(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """[C, T, H, W] each; Qwen-Image's latents come as tokens."""
    latents = kwargs["hidden_states"]
    return list(latents if latents.dim() == 5 else latents.mT.unflatten(-1, (1, 4, 4)))


def _layer_skip(**how: Any) -> Callable[[nn.Module, Path], nn.Module]:
    def apply(model: nn.Module, folder: Path) -> nn.Module:
        apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn=_list_of_blocks(model), **how))
        return model

    return apply


def _list_of_blocks(model: nn.Module) -> str:
    return next(name for name in ("blocks", "transformer_blocks", "layers") if hasattr(model, name))


def _blur_queries(model: nn.Module, folder: Path) -> nn.Module:
    config = SmoothedEnergyGuidanceConfig(indices=[1], fqn=_list_of_blocks(model))
    _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=1.0, name="blur")
    return model


def _do_not_blur(model: nn.Module) -> nn.Module:
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("blur", recurse=True)
    return model


def _remove_layer_skip(model: nn.Module) -> nn.Module:
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("layer_skip_hook", recurse=True)
    return model


NOT_REGISTERED = Upstream("not registered", "diffusers has not registered the attention processor")
NO_CROSS_ATTENTION = Upstream("is_cross_attention", "the hook asks the attention module what those of FLUX.1, FLUX.2 and LTX-2 don't say")
_NO_BLOCK = Upstream("not registered", "diffusers has not registered the blocks of Lumina 2 and LTX-2")
_ASKED_IN_VAIN = dict.fromkeys(("FLUX.1", "FLUX.2", "LTX-2"), NO_CROSS_ATTENTION)

_CACHED = without("SD3", "Z-Image", "Lumina2")  # whose model classes have no enable_cache

FEATURES = (
    Feature(
        "`FirstBlockCacheConfig`",
        _cache(_first_block),
        linears_called,
        _disable,
        run=_run,
        fused="some",
        families=_CACHED,
        upstream={
            "FLUX.2": Upstream("unsupported operand", "the hook takes the first block's two streams for the last block's one"),
            "LTX-2": _NO_BLOCK,
        },
    ),
    Feature(
        "`MagCacheConfig`",
        _cache(_mag_cache),
        linears_called,
        _disable,
        run=_run,
        fused="some",
        families=_CACHED,
        upstream={"LTX-2": _NO_BLOCK},
    ),
    Feature("`TaylorSeerCacheConfig`", _cache(_taylor_seer), linears_called, _disable, run=_run, fused="some", families=_CACHED),
    Feature("`PyramidAttentionBroadcastConfig`", _cache(_pyramid), linears_called, _disable, run=_run, fused="some", families=_CACHED),
    Feature("`FasterCacheConfig`", _cache(_faster_cache), linears_called, _disable, run=_run, fused="some", families=_CACHED),
    Feature(
        "`SeaCacheConfig`",
        _cache(_sea_cache),
        linears_called,
        _disable,
        run=_run,
        fused="some",
        families=without("SD3", "Z-Image", "Lumina2", "FLUX.2"),
        upstream={"LTX-2": _NO_BLOCK},
        note="upstream finds no residual of FLUX.2's blocks and caches nothing",
    ),
    Feature(
        "`TextKVCacheConfig`",
        _cache(diffusers.TextKVCacheConfig),
        calls_of(StateManager, "get_state"),
        _disable,
        run=_run,
        families=_CACHED,
        note="upstream hooks these models and caches nothing: its blocks are NucleusMoE's",
    ),
    Feature(
        "`LayerSkipConfig`, whole block (`SkipLayerGuidance`)",
        _layer_skip(),
        linears_called,
        _remove_layer_skip,
        fused="some",
        upstream={
            "Qwen-Image": Upstream(
                "must match the size of tensor", "the hook returns the two streams in the order of other families' blocks"
            ),
            "SD3": Upstream("is invalid for input of size", "of SD3's, too"),
            "Z-Image": Upstream("hidden_states", "Z-Image's block calls its stream by another name than the hook"),
            "Lumina2": _NO_BLOCK,
            "LTX-2": _NO_BLOCK,
        },
    ),
    Feature(
        "`LayerSkipConfig`, feed-forward",
        _layer_skip(skip_attention=False),
        linears_called,
        _remove_layer_skip,
        families=without("FLUX.2", "Z-Image"),
        fused_in={"Lumina2": "some"},
        note="upstream finds no feed-forward layer in blocks of FLUX.2 and Z-Image",
    ),
    Feature(
        "`LayerSkipConfig`, attention scores (`PerturbedAttentionGuidance`)",
        _layer_skip(skip_attention=False, skip_attention_scores=True, skip_ff=False),
        its_output,
        _remove_layer_skip,
        upstream=dict.fromkeys(("Wan", "HunyuanVideo", "Lumina2", "SD3"), NOT_REGISTERED) | _ASKED_IN_VAIN,
    ),
    Feature(
        "`SmoothedEnergyGuidanceConfig`, blurred queries",
        _blur_queries,
        its_output,
        _do_not_blur,
        upstream=_ASKED_IN_VAIN,
    ),
)
