"""Chroma."""

import torch
from torch import Tensor

from .configuration import Tiny, text_mask
from .flux import FLUX, FLUX_CALLS, SMALL_HEADS, flux_inputs


def _token_mask(g: torch.Generator, b: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([text_mask(b).bool(), torch.ones(b, 16, dtype=torch.bool)], dim=1)


MODELS = {
    "chroma": Tiny(
        "ChromaTransformer2DModel",
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 2},
        flux_inputs(),
        FLUX_CALLS,
        2,
    ),
    "chroma-masked": Tiny(
        "ChromaTransformer2DModel",
        FLUX | SMALL_HEADS | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 2},
        flux_inputs(attention_mask=_token_mask),
        FLUX_CALLS,
        2,
    ),
}
