"""Images as conditions: the embeddings that image-to-video models attend to, and IP-Adapters. Those
that come as tokens are in the tests of the models.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from support import tiny
from torch import Tensor, nn

from .feature import DEVICE, DTYPE, Feature, arguments_of, its_output, unchanged

_MODELS = {"Wan": ("wan-i2v", "encoder_hidden_states_image"), "HunyuanVideo": ("hunyuan-video-1.5", "image_embeds")}


def _load(family: str) -> Any:
    return tiny.load(_MODELS[family][0], DTYPE).to(DEVICE)


def _with_image(model: nn.Module, family: str) -> Tensor:
    arguments = tiny.inputs(_MODELS[family][0], 2, DTYPE)
    return tiny.run(model, {name: t.to(DEVICE) for name, t in arguments.items()})


def _with_empty_image(model: nn.Module, family: str) -> Tensor:
    name, image = _MODELS[family]
    arguments = tiny.inputs(name, 2, DTYPE)
    arguments[image] = torch.zeros_like(arguments[image])
    return tiny.run(model, {name: t.to(DEVICE) for name, t in arguments.items()})


def _sd3_ip_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """As diffusers loads one: a processor with weights in every joint attention."""
    torch.manual_seed(0)
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        attention: Any = block.attn
        processor = SD3IPAdapterJointAttnProcessor2_0(attention.inner_dim, 8, attention.inner_dim // attention.heads, 8)
        attention.set_processor(processor.to(DEVICE, DTYPE))
    return model


def _no_sd3_ip_adapter(model: nn.Module) -> nn.Module:
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        del block.attn.processor  # type: ignore[union-attr]
        block.attn.set_processor(JointAttnProcessor2_0())  # type: ignore[union-attr]
    return model


def _with_prompt_image(model: nn.Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    embeddings = {name: torch.randn(2, *shape, generator=generator).to(DEVICE, DTYPE) for name, shape in _IMAGE.items()}
    return tiny.run(model, arguments_of(family) | {"joint_attention_kwargs": embeddings})


_IMAGE = {"ip_hidden_states": (3, 8), "temb": (8,)}


_IP_TOKENS = 4


def _ip_adapter(model: Any, folder: Path) -> nn.Module:
    """As diffusers loads one: the dual-stream blocks get processors with weights."""
    torch.manual_seed(1)
    width, text_dim = model.inner_dim, model.config.joint_attention_dim
    for block in model.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(width, text_dim, num_tokens=(_IP_TOKENS,), device=DEVICE, dtype=DTYPE)
        block.attn.set_processor(processor)
    return model


def _no_ip_adapter(model: Any) -> nn.Module:
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxAttnProcessor())
    return model


def _with_ip_states(model: nn.Module, family: str) -> Tensor:
    states = torch.randn(2, _IP_TOKENS, tiny.TEXT_DIM, generator=torch.Generator().manual_seed(2)).to(DEVICE, DTYPE)
    return tiny.run(model, arguments_of(family) | {"joint_attention_kwargs": {"ip_hidden_states": [states]}})


FEATURES = (
    Feature(
        "an IP-Adapter's processors, in every block",
        _sd3_ip_adapter,
        its_output,
        _no_sd3_ip_adapter,
        run_with=_with_prompt_image,
        families=("SD3",),
        fused="some",
        refused=r"not fused: its processor .*SD3IPAdapterJointAttnProcessor2_0 is not one that ditnorm knows",
    ),
    Feature(
        "an IP-Adapter's processors, in dual-stream blocks",
        _ip_adapter,
        its_output,
        _no_ip_adapter,
        run_with=_with_ip_states,
        families=("FLUX.1",),
        fused="some",
        refused=r"not fused: its processor .*FluxIPAdapterAttnProcessor is not one that ditnorm knows",
    ),
    Feature(
        "embeddings of an image",
        unchanged,
        its_output,
        run=_with_empty_image,
        run_with=_with_image,
        load=_load,
        families=("Wan", "HunyuanVideo"),
        note="Wan2.1 I2V; HunyuanVideo-1.5",
    ),
)
