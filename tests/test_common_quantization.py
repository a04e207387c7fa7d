"""What the benchmarks and parity scripts quantise of a model: the linear layers of its blocks."""

import pytest
import torch
from common.quantization import quantize
from support import tiny
from torch import nn

pytest.importorskip("torchao")

BLOCKS = {
    "qwen-image": "transformer_blocks",
    "flux2": "transformer_blocks",
    "z-image-small": "layers",
    "lumina2": "layers",
    "ltx2": "transformer_blocks",
}


def quantised(name: str, how: str) -> list[str]:
    model = tiny.load(name, torch.bfloat16)
    quantize(model, how)
    linears = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return [path for path, linear in linears if type(linear.weight.data) is not torch.Tensor]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_quantised_whatever_a_model_calls_them(name: str) -> None:
    assert BLOCKS[name] in {path.partition(".")[0] for path in quantised(name, "int8-row")}


def test_int8_leaves_out_layers_of_one_row() -> None:
    """Of which torchao's compiled product can't be made."""
    assert any("_mod." in path for path in quantised("qwen-image", "float8-row"))
    assert not any("_mod." in path for path in quantised("qwen-image", "int8-row"))


def test_a_model_of_which_nothing_is_quantised_is_an_error() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(16, 24)]), "proj_out": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match="ModuleDict has no linear layer in a block whose sizes are multiples of 16"):
        quantize(model, "int8-row")
