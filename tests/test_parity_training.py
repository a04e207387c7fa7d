"""The script that compares gradients of patched and unpatched models, at a small size."""

import parity_training
import pytest
import torch
from bench.models.catalogue import MODELS
from bench.training.plans import MODELS as TRAINED
from support.real_sizes import shrunk
from support.slow import slow_but


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(parity_training, "MODELS", shrunk(MODELS))


@pytest.mark.parametrize("name", slow_but(["z-image-turbo"], TRAINED))
def test_gradients_of_a_patched_model_are_those_of_eager(name, capsys):
    assert parity_training.main(["--models", name, "--plans", "LoRA", "LoRA, checkpointing"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "LoRA" in line]
    assert len(rows) == 2
    for *_, count, repeated, equal in rows:
        assert 0 < int(count) == int(repeated) == int(equal)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gradient_that_differs_is_named(monkeypatch, capsys):
    def patched(model, **options):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(2)

    monkeypatch.setattr(parity_training.ditnorm, "patch_model", patched)
    assert parity_training.main(["--models", "z-image-turbo"]) == 1
    assert "lora_B.default.weight differs" in capsys.readouterr().out
