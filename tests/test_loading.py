"""Which pipeline class a checkpoint is loaded with, and what it is called with."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines import loading

NEED_A_PICTURE = ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "WanImageToVideoPipeline", "HunyuanVideo15ImageToVideoPipeline"]


def checkpoint(folder: Path, **index: object) -> str:
    (folder / DiffusionPipeline.config_name).write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", ["WanImageToVideoPipeline", "QwenImageEditPipeline", "HunyuanVideoImageToVideoPipeline"])
def test_a_pipeline_that_needs_a_picture_is_loaded_as_named(name: str, image: bool, tmp_path: Path) -> None:
    assert loading.pipeline_class(checkpoint(tmp_path, _class_name=name), image).__name__ == name


@pytest.mark.parametrize(
    ("config", "image", "expected"),
    [
        ({"expand_timesteps": True}, True, "WanImageToVideoPipeline"),
        ({"expand_timesteps": True}, False, "WanPipeline"),
        ({"expand_timesteps": False}, True, "WanPipeline"),
        ({}, True, "WanPipeline"),
    ],
)
def test_a_picture_makes_wan_image_to_video_of_checkpoints_for_both(
    config: dict[str, bool], image: bool, expected: str, tmp_path: Path
) -> None:
    assert loading.pipeline_class(checkpoint(tmp_path, _class_name="WanPipeline", **config), image).__name__ == expected


def test_a_pipeline_that_diffusers_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(loading.CannotRun, match="is a FuturePipeline, which diffusers"):
        loading.pipeline_class(checkpoint(tmp_path, _class_name="FuturePipeline"), image=False)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_torchvision(*args: Any, **kwargs: Any) -> None:
        raise ImportError("Qwen3VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(diffusers.QwenImage21Pipeline, "from_pretrained", needs_torchvision)
    with pytest.raises(loading.CannotRun, match="requires the Torchvision library"):
        loading.load(checkpoint(tmp_path, _class_name="QwenImage21Pipeline"), torch.float32)


def arguments(pipeline: str, folder: Path, image: Path | None) -> dict[str, Any]:
    pipe = object.__new__(getattr(diffusers, pipeline))
    return loading.call_arguments(str(folder), pipe, prompt=None, default_prompt="a cat", image=image)


@pytest.mark.parametrize("pipeline", ["QwenImage21Pipeline", *NEED_A_PICTURE])
def test_a_picture_is_passed_on(pipeline: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.radial_gradient("L").save(path)
    passed = arguments(pipeline, tmp_path, path)
    assert passed.keys() == {"prompt", "image"}
    assert passed["image"].mode == "RGB"


def test_a_pipeline_that_draws_without_a_picture_needs_none(tmp_path: Path) -> None:
    assert arguments("QwenImage21Pipeline", tmp_path, None) == {"prompt": "a cat"}


@pytest.mark.parametrize("pipeline", NEED_A_PICTURE)
def test_a_pipeline_that_only_edits_or_animates_asks_for_the_picture(pipeline: str, tmp_path: Path) -> None:
    """Those of Qwen-Image, too, though their signatures have a default for it."""
    with pytest.raises(loading.CannotRun, match="needs --image PATH"):
        arguments(pipeline, tmp_path, None)
