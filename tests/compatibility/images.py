"""Images as conditions: the embeddings that image-to-video models attend to. Those that come as
tokens are in the tests of the models.
"""

from typing import Any

import torch
from support import tiny
from torch import Tensor, nn

from .feature import DEVICE, DTYPE, Feature, its_output, unchanged

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


FEATURES = (
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
