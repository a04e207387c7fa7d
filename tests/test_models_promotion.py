"""Modulations in float32 over a half-precision stream: PyTorch promotes in upstream's blocks, Wan's
cast.
"""

import pytest
import torch
from support import tiny
from support.slow import slow_but
from torch import Tensor, nn

from ditnorm import patch_model

NAMES = [name for name in tiny.MODELS if name.startswith(("qwen", "hunyuan", "sd3", "flux", "chroma"))]
ONE_OF_EACH = ["qwen-image-edit-zero-cond-t", "qwen-image-2.1", "hunyuan-video-token-replace", "hunyuan-image", "sd3.5-medium"]
ONE_OF_EACH += ["flux", "chroma", "flux2"]
MODULATIONS = (
    "img_mod.1",
    "txt_mod.1",
    "norm1.linear",
    "norm1_context.linear",
    "norm.linear",
    "norm_out.linear",
    "modulation.1",
    "modulation.linear",
    "modulation_img.linear",
    "modulation_txt.linear",
    "guidance_layer.out_proj",
)
PROJECTIONS = ("_q", "_k", "_v", "q_proj", "k_proj", "v_proj")
"""PyTorch's attention takes no value of another dtype than its normed query, upstream either."""


class Wide(nn.Module):
    """A linear that computes in float32 and returns that."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float())


class Casting(nn.Module):
    """A linear that takes any dtype and returns its own, as quantised ones do."""

    def __init__(self, linear: nn.Linear, like_input: bool) -> None:
        super().__init__()
        self.linear, self.like_input = linear, like_input

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x.to(self.linear.weight.dtype))
        return out.to(x.dtype) if self.like_input else out


def model(name: str, dtype: torch.dtype, wide_in: str, like_input: bool) -> nn.Module:
    model = tiny.load(name, dtype)
    found = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            wide = path.endswith(MODULATIONS) and wide_in in path and "refiner" not in path  # where upstream raises
            found += wide
            model.set_submodule(path, Wide(module) if wide else Casting(module, like_input and not path.endswith(PROJECTIONS)))
    assert found
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("like_input", [False, True], ids=["half linears", "linears like their input"])
@pytest.mark.parametrize("wide_in", ["", "blocks.0."], ids=["all", "one block"])
@pytest.mark.parametrize("name", slow_but(ONE_OF_EACH, NAMES))
def test_float32_modulations_promote_the_stream_as_upstream(name: str, wide_in: str, like_input: bool, dtype: torch.dtype) -> None:
    if wide_in and name.startswith(("qwen-image-2.1", "chroma", "flux2")):
        pytest.skip("its modulation is the model's")
    upstream, patched = (model(name, dtype, wide_in, like_input) for _ in range(2))
    arguments = tiny.inputs(name, 2, dtype)
    expected = tiny.run(upstream, arguments)
    output = tiny.run(patch_model(patched), arguments)
    assert output.dtype is expected.dtype
    assert torch.equal(output, expected)
