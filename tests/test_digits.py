"""The trained pipelines of ``examples/digits`` draw what they are asked for, and draw the same when
patched.
"""

import pytest
import torch
from digits import dataset, families
from pipelines import loading
from pipelines.generation import generate

import ditnorm

FAMILIES = families.FAMILIES
SHIPPED_BYTES = 3e6


@pytest.fixture(params=FAMILIES.values(), ids=list(FAMILIES))
def family(request):
    return request.param


def load(family, dtype, device):
    return loading.load(str(family.folder), dtype).to(device)


def test_vae_enlarges_digits_so_that_they_stay_readable(family):
    latents, labels = (each[:20] for each in family.latents())
    with torch.no_grad():
        frames = family.build().vae.decode(latents, return_dict=False)[0]
    height, width = family.size["height"], family.size["width"]
    assert frames.shape == (20, 3, family.size.get("num_frames", 1), height, width)
    read = dataset.read_frames(frames.transpose(1, 2) / 2 + 0.5)
    assert (read == labels[:, None]).float().mean() >= 0.95


def test_classifier_reads_digits_it_was_not_trained_on():
    """A classifier that had learned the pictures by heart would prove little about generated
    ones.
    """
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    latents, labels = dataset.images()
    scores = cross_val_score(SVC(gamma=dataset.GAMMA), latents.flatten(1).numpy(), labels.numpy(), cv=3)
    assert scores.mean() >= 0.95


def test_shipped_weights_are_small(family):
    weights = [path.stat().st_size for path in family.folder.rglob("*.safetensors")]
    assert len(weights) == 3  # transformer, VAE, prompts
    assert sum(weights) <= SHIPPED_BYTES


def test_nine_of_ten_generated_digits_are_read_correctly(family, device):
    """Of 200. The weights decide it, not the dtype: float32 is what a CPU is fastest in."""
    assert families.share_read(family, family.folder, load(family, torch.float32, device)) >= 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_patched_pipelines_draw_the_same_bits(family, dtype, device):
    """So what is read off them is the same, too."""
    pipe = load(family, dtype, device)
    arguments = family.call_arguments([3, 7], pipe, family.folder)
    before = generate(pipe, arguments, steps=3)
    ditnorm.patch_pipeline(pipe, strict=True)
    after = generate(pipe, arguments, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before.latents, after.latents, strict=True))
    assert torch.equal(before.frames, after.frames)
    assert before.frames.isfinite().all()
