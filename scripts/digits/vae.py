"""Sets the weights of a tiny VAE by hand, so that decoding enlarges a one-channel latent to a
smooth grey picture.
"""

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoUpsampleCausal3D
from torch import Tensor, nn

CARRIED = 4  # channels: x, -x, C, -C
CONSTANT = 8.0
BLUR = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))


@torch.no_grad()
def set_weights(vae: Any) -> ModelMixin:
    """Overwrites every weight; the encoder, which nothing uses here, becomes zero.

    The residual branches become zero. The trunk carries x, -x, C and -C with C constant, blurred
    after every enlargement and interpolated between latent frames. The norm before the last
    convolution divides by nearly C, so it is nearly linear; and silu(x) - silu(-x) = x.
    """
    for parameter in vae.parameters():
        parameter.zero_()
    for name, module in vae.decoder.named_modules():
        if isinstance(module, HunyuanVideoUpsampleCausal3D):
            # It repeats frames and then convolves causally: an average with the frame before
            # interpolates.
            time = torch.tensor([0.0, 0.5, 0.5] if module.upsample_factor[0] == 2 else [0.0, 0.0, 1.0])
            _carry(module.conv.conv.weight, time.view(3, 1, 1) * BLUR)
        elif name.endswith("resample.1"):
            _carry(module.weight, BLUR)
        elif name.endswith("time_conv"):  # the first half of its channels are the frame in between
            between, itself = module.weight.chunk(2)
            _carry(between, torch.tensor([0.0, 0.5, 0.5]).view(3, 1, 1))
            _carry(itself, torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1))
        elif isinstance(module, nn.Conv3d) and "conv_shortcut" in name:
            _carry(module.weight, torch.ones(1, 1, 1))
    _carry(vae.post_quant_conv.weight, torch.ones(1, 1, 1))
    first, norm, last = _ends(vae.decoder)
    first.weight[:2, 0, -1, 1, 1] = torch.tensor([1.0, -1.0])
    first.bias[2:CARRIED] = torch.tensor([CONSTANT, -CONSTANT])
    next(norm.parameters()).fill_(1)
    # Over the four carried channels the norm's divisor is sqrt((C^2 + x^2) / 2).
    last.weight[:, :2, -1, 1, 1] = torch.tensor([CONSTANT, -CONSTANT]) / 2**0.5
    return vae


def _carry(weight: Tensor, taps: Tensor) -> None:
    """Makes a convolution pass each carried channel on, filtered by ``taps``."""
    for channel in range(min(CARRIED, *weight.shape[:2])):
        weight[channel, channel] = taps


def _ends(decoder: Any) -> tuple[Any, Any, Any]:
    """The first convolution, the last norm and the last convolution."""
    norm = decoder.norm_out if hasattr(decoder, "norm_out") else decoder.conv_norm_out
    first, last = (getattr(conv, "conv", conv) for conv in (decoder.conv_in, decoder.conv_out))
    return first, norm, last
