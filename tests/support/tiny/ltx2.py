"""LTX-2, 2.3 and 2.5: video with audio."""

from typing import Any

import torch

from .configuration import TEXT, TEXT_DIM, Inputs, Tiny, random_text, text_mask, timesteps

_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64,
    "num_layers": 2,
    "caption_channels": TEXT_DIM,
    "rope_type": "split",
}
_LTX23 = {
    **_LTX2,
    **dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn"), True),
    "use_prompt_embeddings": False,
}
_LTX2_CALLS = (2 * 4, 2 * 6, 2 * 2, 2 * 6, 0)


def _ltx2(image: bool = False, **more: Any) -> Inputs:
    """2 x 3 x 2 tokens of video, the first frame given where there is an ``image``; 5 of audio."""

    def make(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
        timestep = timesteps(b).to(torch.float32)
        per_token = timestep[:, None].repeat(1, 12)
        per_token[:, :6] = 0
        return {
            "hidden_states": torch.randn(b, 12, 4, generator=g).to(dtype),
            "audio_hidden_states": torch.randn(b, 5, 4, generator=g).to(dtype),
            "encoder_hidden_states": random_text(g, b, dtype),
            "audio_encoder_hidden_states": random_text(g, b, dtype),
            "timestep": per_token if image else timestep,
            "audio_timestep": timestep,
            "encoder_attention_mask": text_mask(b),
            "audio_encoder_attention_mask": text_mask(b),
            "num_frames": 2,
            "height": 3,
            "width": 2,
            "audio_num_frames": 5,
            **more,
        }

    return make


def _ltx23(**more: Any) -> Inputs:
    """With the noise levels that modulate the prompts, of which the connectors make what each
    stream takes.
    """

    def make(g: torch.Generator, b: int, dtype: torch.dtype) -> dict[str, Any]:
        arguments = _ltx2(**more)(g, b, dtype)
        arguments["encoder_hidden_states"] = torch.randn(b, TEXT, 128, generator=g).to(dtype)
        arguments["audio_encoder_hidden_states"] = torch.randn(b, TEXT, 64, generator=g).to(dtype)
        return arguments | {"sigma": timesteps(b).to(torch.float32), "use_cross_timestep": True}

    return make


MODELS = {
    "ltx2": Tiny("LTX2VideoTransformer3DModel", _LTX2, _ltx2(), _LTX2_CALLS),
    # The first frame is given: a modulation for each token of video.
    "ltx2-image": Tiny("LTX2VideoTransformer3DModel", _LTX2, _ltx2(image=True), _LTX2_CALLS),
    "ltx2.3": Tiny("LTX2VideoTransformer3DModel", _LTX23, _ltx23(), _LTX2_CALLS),
    # For guidance: neither stream sees the other, or some blocks don't attend.
    "ltx2.3-isolated": Tiny("LTX2VideoTransformer3DModel", _LTX23, _ltx23(isolate_modalities=True), (2 * 2, 2 * 4, 2 * 2, 2 * 4, 0)),
    "ltx2.3-perturbed": Tiny(
        "LTX2VideoTransformer3DModel", _LTX23, _ltx23(spatio_temporal_guidance_blocks=[1]), (*_LTX2_CALLS[:3], 2 * 6 - 2, 0)
    ),
    # As the class has it where nothing is said: neighbours are rotated.
    "ltx2-interleaved": Tiny("LTX2VideoTransformer3DModel", _LTX2 | {"rope_type": "interleaved"}, _ltx2(), _LTX2_CALLS),
    # 2.5: prompts modulated by tables alone.
    "ltx2.5": Tiny("LTX2VideoTransformer3DModel", _LTX23 | {"use_prompt_adaln_single": False, "ff_bias": False}, _ltx23(), _LTX2_CALLS),
}
