"""scikit-learn's handwritten digits as latents of the tiny pipelines, and a classifier that reads
generated ones.

Source: UCI ML hand-written digits (Alpaydin and Kaynak, 1998; CC BY 4.0), 1797 pictures of 8 x 8
pixels, shipped with scikit-learn.
"""

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

SIDE = 8  # of a digit, latent pixels; also what the VAEs of the tiny pipelines enlarge by
# Of a video: the digit moves one latent pixel to the right from one latent frame to the next.
WIDTH, LATENT_FRAMES = 12, 4
FRAMES = 4 * LATENT_FRAMES - 3  # of a decoded video
CLASSES = 10
GAMMA = 0.05  # of the classifier: the best of five in a hold-out test


@functools.cache
def _data() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images).float() / 8 - 1, torch.from_numpy(data.target)


def images() -> tuple[Tensor, Tensor]:
    """Latents ``[N, 1, 1, 8, 8]``, -1 (background) to 1, and labels ``[N]``."""
    pictures, labels = _data()
    return pictures[:, None, None], labels


def videos() -> tuple[Tensor, Tensor]:
    """Latents ``[N, 1, 4, 8, 12]``, -1 to 1, of the digits moving to the right, and labels
    ``[N]``.
    """
    pictures, labels = _data()
    frames = [F.pad(pictures, (left, WIDTH - SIDE - left), value=-1) for left in range(LATENT_FRAMES)]
    return torch.stack(frames, dim=1)[:, None], labels


@functools.cache
def _classifier() -> SVC:
    pictures, labels = _data()
    return SVC(gamma=GAMMA).fit(pictures.flatten(1).numpy(), labels.numpy())


def read(latents: Tensor) -> Tensor:
    """The digits that a classifier of the real ones sees in latents ``[N, 1, F, 8, W]``.

    Returns labels ``[N, 2]`` for the first and the last frame, each read where the digit is then.
    """
    first, last = latents[:, 0, 0, :, :SIDE].float(), latents[:, 0, -1, :, latents.shape[2] - 1 :][..., :SIDE].float()
    labels = [_classifier().predict(digits.flatten(1).cpu().numpy()) for digits in (first, last)]
    return torch.stack([torch.from_numpy(each) for each in labels], dim=1)


def read_frames(frames: Tensor) -> Tensor:
    """:func:`read` for decoded frames ``[N, F, 3, H, W]``, 0 to 1: a latent frame every fourth, a
    latent pixel every 8 x 8.
    """
    small = F.avg_pool2d(frames[:, ::4].float().mean(2), SIDE) * 2 - 1
    return read(small[:, None])
