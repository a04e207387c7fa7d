"""Qwen-Image: Edit, Layered, with a ControlNet."""

from typing import Any

import torch

from .configuration import TEXT, TEXT_DIM, Inputs, Tiny

_QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (8, 4, 4),
}
_QWEN_IMAGE_CALLS = (3 * 2 + 1, 3 * 2, 3 * 2, 0, 3)


def _qwen_image(shapes: list[Any], channels: int = 16, **more: Any) -> Inputs:
    def make(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
        tokens = sum(f * h * w for f, h, w in shapes)
        mask = torch.ones(b, TEXT, dtype=torch.long)
        mask[-1, -2:] = 0
        arguments = {
            "hidden_states": torch.randn(b, tokens, channels, generator=g).to(dtype),
            "encoder_hidden_states": torch.randn(b, TEXT, TEXT_DIM, generator=g).to(dtype),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.linspace(0.3, 0.9, b).to(dtype),
            "img_shapes": [shapes] * b,
        }
        return arguments | {k: v(g, b, tokens, dtype) for k, v in more.items()}

    return make


MODELS = {
    "qwen-image": Tiny("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_image([(1, 4, 4)]), _QWEN_IMAGE_CALLS),
    # Edit and Edit-Plus: the pictures to edit follow as tokens.
    "qwen-image-edit": Tiny("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_image([(1, 4, 4), (1, 2, 4), (1, 3, 3)]), _QWEN_IMAGE_CALLS),
    # Edit-2511: their tokens are modulated as of timestep 0.
    "qwen-image-edit-zero-cond-t": Tiny(
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE | {"zero_cond_t": True},
        _qwen_image([(1, 4, 4), (1, 2, 4), (1, 3, 3)]),
        _QWEN_IMAGE_CALLS,
    ),
    "qwen-image-layered": Tiny(
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE | {"use_layer3d_rope": True, "use_additional_t_cond": True},
        _qwen_image([(1, 4, 4), (1, 4, 4), (1, 4, 4)], additional_t_cond=lambda g, b, tokens, dtype: torch.arange(b) % 2),
        _QWEN_IMAGE_CALLS,
    ),
    # Inpaint: a ControlNet's samples are added between the blocks.
    "qwen-image-controlled": Tiny(
        "QwenImageTransformer2DModel",
        _QWEN_IMAGE,
        _qwen_image(
            [(1, 4, 4)],
            controlnet_block_samples=lambda g, b, tokens, dtype: [torch.randn(b, tokens, 48, generator=g).to(dtype) for _ in range(2)],
        ),
        _QWEN_IMAGE_CALLS,
    ),
    "qwen-image-controlnet": Tiny(
        "QwenImageControlNetModel",
        _QWEN_IMAGE | {"extra_condition_channels": 4},
        _qwen_image([(1, 4, 4)], controlnet_cond=lambda g, b, tokens, dtype: torch.randn(b, tokens, 20, generator=g).to(dtype)),
        (3 * 2, 3 * 2, 3 * 2, 0, 3),
    ),
}
