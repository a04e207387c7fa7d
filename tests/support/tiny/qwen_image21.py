"""Qwen-Image-2.1."""

from typing import Any

import torch

from .configuration import TEXT_DIM, Inputs, Tiny

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


def _qwen_image21(shapes: list[tuple[int, int, int]]) -> Inputs:
    """The text, a slot for each four tokens of the first pictures, more text, and the slots of the
    last picture, which is the target.
    """

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


MODELS = {
    "qwen-image-2.1": Tiny("QwenImage21Transformer2DModel", _QWEN_IMAGE21, _qwen_image21([(1, 4, 4)]), _QWEN_IMAGE21_CALLS, 3),
    # The pictures to edit stand between the words.
    "qwen-image-2.1-edit": Tiny(
        "QwenImage21Transformer2DModel", _QWEN_IMAGE21, _qwen_image21([(1, 2, 2), (1, 4, 2), (1, 4, 4)]), _QWEN_IMAGE21_CALLS, 3
    ),
    "qwen-image-2.1-without-causal-condition": Tiny(
        "QwenImage21Transformer2DModel", _QWEN_IMAGE21 | {"causal_condition": False}, _qwen_image21([(1, 4, 4)]), _QWEN_IMAGE21_CALLS, 3
    ),
}
