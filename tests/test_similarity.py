"""PSNR, SSIM and relative error against values known from their definitions."""

import math

import pytest
import torch
from pipelines.similarity import frame_difference, psnr, relative_error, ssim


def test_psnr_of_a_constant_offset():
    a = torch.full((1, 3, 16, 16), 0.5)
    assert psnr(a, a + 0.1).item() == pytest.approx(20, abs=1e-4)  # -10 log10(0.1 ** 2), the offset rounded to float32
    assert psnr(a, a).item() == math.inf


def test_ssim_of_flat_frames_is_their_luminance_term():
    a, b = torch.full((1, 3, 16, 16), 0.25), torch.full((1, 3, 16, 16), 0.75)
    c1 = 0.01**2
    assert ssim(a, b).item() == pytest.approx((2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1), abs=1e-9)


def test_ssim_is_one_for_equal_frames_and_near_zero_for_unrelated_ones():
    a, b = torch.rand(2, 1, 3, 64, 64)
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-9)
    assert abs(ssim(a, b).item()) < 0.1


def test_relative_error():
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)


def test_the_worst_frame_is_found_and_json_has_no_infinity():
    a = torch.full((3, 3, 16, 16), 0.5)
    b = a.clone()
    b[1] += 0.1
    difference = frame_difference(b, a)
    assert (difference.worst_frame, round(difference.worst_psnr)) == (1, 20)
    assert difference.json()["psnr"] is None
