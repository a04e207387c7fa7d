"""Which pipeline class a checkpoint is loaded with."""

import json
from pathlib import Path

import loading
import pytest
from diffusers import DiffusionPipeline


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
