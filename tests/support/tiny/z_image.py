"""Z-Image: narrow heads, Omni."""

from typing import Any

import torch

from .configuration import TEXT, TEXT_DIM, Tiny

_Z_IMAGE = {
    "in_channels": 16,
    "dim": 256,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": TEXT_DIM,
    "axes_dims": [32, 48, 48],
    "axes_lens": [256, 64, 64],
}
_Z_IMAGE_SMALL = _Z_IMAGE | {"dim": 48, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [8, 4, 4]}
_Z_IMAGE_CALLS = (4 + 1, 0, 0, 4, 0, 4, 4)


def _z_image(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    """Captions of different lengths, each padded to 32 tokens; pictures of 40, padded to 64."""
    return {
        "x": [torch.randn(16, 1, 10, 16, generator=g).to(dtype) for _ in range(b)],
        "t": torch.linspace(0.3, 0.9, b).to(dtype),
        "cap_feats": [torch.randn(TEXT + 30 * i, TEXT_DIM, generator=g).to(dtype) for i in range(b)],
    }


def _z_image_omni(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
    """A picture to go by, given, and the target, which is noisy."""
    images, captions, features = [], [], []
    for _ in range(b):
        images.append([torch.randn(16, 1, 8, 8, generator=g).to(dtype) for _ in range(2)])
        captions.append([torch.randn(TEXT, TEXT_DIM, generator=g).to(dtype) for _ in range(3)])
        features.append([torch.randn(4, 4, 12, generator=g).to(dtype), None])
    return {
        "x": images,
        "t": torch.linspace(0.3, 0.9, b).to(dtype),
        "cap_feats": captions,
        "siglip_feats": features,
        "image_noise_mask": [[0, 1]] * b,
    }


MODELS = {
    "z-image": Tiny("ZImageTransformer2DModel", _Z_IMAGE, _z_image, _Z_IMAGE_CALLS, 4),
    "z-image-small": Tiny("ZImageTransformer2DModel", _Z_IMAGE_SMALL, _z_image, _Z_IMAGE_CALLS, 4),
    # Some tokens are given: two modulations, by a mask. A third refiner, of SigLIP's features.
    "z-image-omni": Tiny("ZImageTransformer2DModel", _Z_IMAGE_SMALL | {"siglip_feat_dim": 12}, _z_image_omni, (5 + 1, 0, 0, 5, 0, 5, 5), 5),
}
