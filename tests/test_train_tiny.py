"""Training of the tiny pipelines: learns, resumes with the same result, and writes what can be
loaded.
"""

import pytest
import torch
import train_tiny
from digits import families
from pipelines import loading
from pipelines.generation import generate
from safetensors.torch import load_file

from ditnorm.fused.module import upstream_of

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def train(folder, *options):
    arguments = ["--families", "qwen-image", "--batch", "4", "--out", str(folder), "--checkpoints", str(folder / "state"), *options]
    return train_tiny.main(arguments)


def test_trains_the_patched_model_and_the_loss_falls():
    training = train_tiny.Training(families.FAMILIES["qwen-image"], 1000, 8, torch.device("cpu"))
    block = training.model.transformer_blocks[0]
    assert upstream_of(type(block)) is not type(block)
    losses = [training.step().item() for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=list(families.FAMILIES))
def test_every_family_trains(family):
    training = train_tiny.Training(family, 1000, 2, torch.device("cpu"))
    before = {name: p.clone() for name, p in training.model.named_parameters()}
    assert training.step().isfinite()
    blocks = [name for name in before if "blocks" in name and "refiner" not in name]
    unchanged = [name for name in blocks if torch.equal(dict(training.model.named_parameters())[name], before[name])]
    # The last block of Qwen-Image and of HunyuanVideo has a text stream that nothing reads.
    assert all("txt" in name or "context" in name or "add" in name for name in unchanged), unchanged


def test_interrupted_training_resumes_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "CHECKPOINT_EVERY", 2)
    assert train(tmp_path / "whole", "--steps", "4") == 0

    step, taken = train_tiny.Training.step, []

    def interrupted(self):
        taken.append(None)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(train_tiny.Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", "--steps", "4")
    monkeypatch.setattr(train_tiny.Training, "step", step)
    assert train(tmp_path / "parts", "--steps", "4") == 0

    whole, parts = (load_file(tmp_path / name / "qwen-image" / WEIGHTS) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_checkpoint_of_another_training_is_refused(tmp_path):
    assert train(tmp_path, "--steps", "1") == 0
    with pytest.raises(SystemExit, match="--steps 1 --batch 4"):
        train(tmp_path, "--steps", "2")


def test_writes_a_pipeline_that_generates_and_a_loss_curve(tmp_path):
    assert train(tmp_path, "--steps", "2") == 0
    folder = tmp_path / "qwen-image"
    assert (folder / "loss.png").stat().st_size > 0
    pipe = loading.load(str(folder), torch.float32)
    arguments = loading.call_arguments(str(folder), pipe, prompt="42", default_prompt="")
    assert generate(pipe, arguments, steps=1).frames.shape == (2, 1, 3, 64, 64)
