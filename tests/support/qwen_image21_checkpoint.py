"""A tiny checkpoint of Qwen-Image 2.1 with every component of its pipeline. A module, because
diffusers loads ``Processor`` by name.
"""

from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,  # noqa: F401  diffusers looks among the names here for the base class that tells how to load
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from . import tiny

_MARKS = ["<|im_start|>", "<|im_end|>", "<image1>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_WORDS = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "system", "user", "assistant", "a", "cat", *_MARKS])}
_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
_CHANNELS = 16
_PIXELS = 1024**2  # of the picture to edit, to which the pipeline resizes it


class Processor(Qwen3VLProcessor):
    """Without a processor of videos, which would need torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template)


def save(folder: Path) -> str:
    """Writes the checkpoint; returns ``folder`` as the scripts take it."""
    torch.manual_seed(0)
    config = tiny.MODELS["qwen-image-2.1"].config | {"in_channels": _CHANNELS, "out_channels": _CHANNELS}
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=_CHANNELS,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * _CHANNELS,
        latents_std=[1.0] * _CHANNELS,
    )
    pipe = diffusers.QwenImage21Pipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae,
        _text_encoder(),
        _processor(),
        diffusers.QwenImage21Transformer2DModel(**config),
    )
    pipe.save_pretrained(folder)
    return str(folder)


def _processor() -> Processor:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(_WORDS, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(_MARKS)
    return Processor(
        Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=32**2, max_pixels=_PIXELS),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"),
        chat_template=_CHAT,
    )


def _text_encoder() -> Qwen3VLForConditionalGeneration:
    small = {"hidden_size": tiny.TEXT_DIM, "intermediate_size": 16}
    text = {
        "vocab_size": len(_WORDS),
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": tiny.TEXT_DIM, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config=small | text,
        vision_config=small | vision,
        image_token_id=_WORDS["<|image_pad|>"],
        video_token_id=_WORDS["<|video_pad|>"],
        vision_start_token_id=_WORDS["<|vision_start|>"],
        vision_end_token_id=_WORDS["<|vision_end|>"],
    )
    return Qwen3VLForConditionalGeneration(config)
