"""Lumina-Image 2.0."""

from typing import Any

import torch

from .configuration import TEXT_DIM, Tiny, random_text, text_mask


def _lumina2(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    """Captions of different lengths."""
    return {
        "hidden_states": torch.randn(b, 4, 8, 8, generator=g).to(dtype),
        "timestep": torch.linspace(0.3, 0.9, b).to(dtype),
        "encoder_hidden_states": random_text(g, b, dtype),
        "encoder_attention_mask": text_mask(b),
    }


MODELS = {
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 96,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (8, 8, 8),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": TEXT_DIM,
        },
        _lumina2,
        (3 + 1, 0, 0, 4, 0, 4, 4),  # the norm before the attention of the text alone is upstream's
        4,
    ),
}
