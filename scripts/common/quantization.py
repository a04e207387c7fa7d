"""Models with the linear layers of their blocks quantised by torchao."""

import importlib
import re
import unittest.mock
from contextlib import nullcontext
from typing import Any

from torch import nn

QUANTIZATIONS = ("float8-row", "float8-tensor", "int8-row")
_MULTIPLE = 16  # of which float8 matrix products take the sizes
_IN_A_BLOCK = re.compile(r"(^|[._])(blocks|layers)\.\d")
_ONE_ROW = re.compile(r"(_mod|\.norm\w*|adaLN_modulation)\.")
"""In the path of a layer that makes modulations, of one row a sample: torchao's int8 product, where
it is compiled, raises for fewer than 17.
"""


def quantize(model: nn.Module, name: str) -> None:
    """Replaces the weights of the blocks, in place. int8 leaves out those that make modulations.

    Raises:
        ValueError: where no linear layer in a block has sizes that can be multiplied.
    """
    torchao: Any = importlib.import_module("torchao.quantization")

    configs: dict[str, Any] = {
        "float8-row": lambda: torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow()),
        "float8-tensor": lambda: torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerTensor()),
        "int8-row": torchao.Int8DynamicActivationInt8WeightConfig,
    }

    def chosen(module: nn.Module, path: str) -> bool:
        if not isinstance(module, nn.Linear) or not _IN_A_BLOCK.search(path) or (name == "int8-row" and _ONE_ROW.search(path)):
            return False
        return not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)

    if not any(chosen(module, path) for path, module in model.named_modules()):
        raise ValueError(f"{type(model).__name__} has no linear layer in a block whose sizes are multiples of {_MULTIPLE}")
    on_gpu = next(model.parameters()).is_cuda
    # torchao makes float8 weights for a GPU only. PyTorch multiplies them on the CPU too, which is
    # enough to try things out.
    unchecked = nullcontext() if on_gpu else unittest.mock.patch("torchao.quantization.quant_api._check_hardware_support")
    with unchecked:
        torchao.quantize_(model, configs[name](), filter_fn=chosen)
