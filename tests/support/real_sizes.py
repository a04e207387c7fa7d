"""The real models of ``scripts/bench/models``, shrunk until they run on a CPU in a second; every
path of theirs stays.
"""

from dataclasses import replace
from typing import Any

_SMALL: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
_Z_IMAGE: dict[str, Any] = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 4, 4]}
_LUMINA2: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 3, "num_kv_heads": 1, "axes_dim_rope": (8, 4, 4), "multiple_of": 16}
_LTX2: dict[str, Any] = _SMALL | {
    "cross_attention_dim": 32,
    "audio_attention_head_dim": 8,
    "audio_num_attention_heads": 2,
    "audio_cross_attention_dim": 16,
    "caption_channels": 16,
}
_OF_CLASS = {
    "ZImageTransformer2DModel": _Z_IMAGE,
    "Lumina2Transformer2DModel": _LUMINA2,
    "LTX2VideoTransformer3DModel": _LTX2,
}
_TEXT = {
    "cap_feat_dim": 16,
    "joint_attention_dim": 16,
    "context_in_dim": 16,
    "text_dim": 16,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "text_embed_2_dim": 16,
    "image_embed_dim": 16,
}
_AXES = {"Flux2Transformer2DModel": (4, 4, 4, 4)}
_ROPE = {
    "Flux2Transformer2DModel": "axes_dims_rope",
    "QwenImageTransformer2DModel": "axes_dims_rope",
    "FluxTransformer2DModel": "axes_dims_rope",
    "ChromaTransformer2DModel": "axes_dims_rope",
    "QwenImage21Transformer2DModel": "axes_dims_rope",
    "HunyuanVideoTransformer3DModel": "rope_axes_dim",
    "HunyuanVideo15Transformer3DModel": "rope_axes_dim",
}


def shrunk(models: dict[str, Any]) -> dict[str, Any]:
    """Narrow models of few tokens and two layers of each kind."""
    result = {}
    for name, real in models.items():
        small = _OF_CLASS.get(real.cls, _SMALL)
        config = {**real.config, **small, **{key: value for key, value in _TEXT.items() if key in real.config}}
        if "approximator_hidden_dim" in config:
            config["approximator_hidden_dim"] = 32
        if "ffn_dim" in config:
            config["ffn_dim"] = 64
        if real.cls in _ROPE:
            config[_ROPE[real.cls]] = _AXES.get(real.cls, (4, 6, 6))
        config |= dict.fromkeys(real.measured, 2)
        if "caption_projection_dim" in config:
            config["caption_projection_dim"] = 32
        sizes = {3: (16, real.latents[2]), 4: (real.latents[1], 4, 4), 5: (real.latents[1], 2, 4, 4)}
        result[name] = replace(real, config=config, measured=dict.fromkeys(real.measured, 2), latents=(1, *sizes[len(real.latents)]))
    return result
