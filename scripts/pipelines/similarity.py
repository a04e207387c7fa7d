"""How much two tensors, or two sequences of frames, differ."""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the SSIM: Wang et al., Image quality assessment, IEEE TIP 13(4), 2004.
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class FrameDifference:
    """Over all frames: their mean, and the worst one with its index. Infinite PSNR: equal."""

    psnr: float
    worst_psnr: float
    worst_frame: int
    ssim: float
    worst_ssim: float
    lpips: float | None
    """Mean; None where the package lpips isn't installed."""

    def json(self) -> dict[str, Any]:
        """JSON has no infinity: null."""
        return {name: None if value == math.inf else value for name, value in vars(self).items()}


def relative_error(a: Tensor, exact: Tensor) -> float:
    """``|a - exact| / |exact|`` in the Euclidean norm."""
    exact = exact.double()
    return ((a.double() - exact).norm() / exact.norm()).item()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each frame of ``[N, C, H, W]``, 0 to 1."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each frame of ``[N, C, H, W]``, 0 to 1, with the usual Gaussian
    window of 11 x 11 pixels.
    """
    offsets = torch.arange(_WINDOW, dtype=torch.double, device=a.device) - _WINDOW // 2
    line = (-offsets.square() / (2 * _SIGMA**2)).exp()
    line = line / line.sum()
    channels = a.shape[1]
    kernel = torch.outer(line, line).expand(channels, 1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=channels)

    a, b = a.double(), b.double()
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return (luminance * structure).mean((1, 2, 3))


def frame_difference(a: Tensor, b: Tensor) -> FrameDifference:
    """Compares frames ``[N, C, H, W]``, 0 to 1, one by one: RGB, or RGBA, of which LPIPS leaves out
    alpha.
    """
    pairs = [(x[None], y[None]) for x, y in zip(a, b, strict=True)]
    ratios = torch.cat([psnr(*pair) for pair in pairs])
    similarities = torch.cat([ssim(*pair) for pair in pairs])
    return FrameDifference(
        ratios.mean().item(),
        ratios.min().item(),
        int(ratios.argmin()),
        similarities.mean().item(),
        similarities.min().item(),
        _lpips(a[:, :3], b[:, :3]),
    )


def _lpips(a: Tensor, b: Tensor) -> float | None:
    if importlib.util.find_spec("lpips") is None:
        return None
    import lpips  # type: ignore[import-not-found]

    with torch.inference_mode():
        measure = lpips.LPIPS(net="alex", verbose=False)
        return torch.cat([measure(x[None], y[None], normalize=True).flatten() for x, y in zip(a, b, strict=True)]).mean().item()
