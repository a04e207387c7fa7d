"""Models with quantised weights, as ``quantize_`` of torchao makes them on a GPU; some of its
configurations ask for one.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditnorm.ops.quantization import FLOAT8_ROW, FLOAT8_TENSOR, INT8_ROW, Law

LAWS = (FLOAT8_ROW, FLOAT8_TENSOR, INT8_ROW)


def config(law: Law) -> Any:
    """Torchao's configuration with this law."""
    torchao = pytest.importorskip("torchao.quantization")
    if law is INT8_ROW:
        return torchao.Int8DynamicActivationInt8WeightConfig()
    granularity = torchao.PerRow() if law is FLOAT8_ROW else torchao.PerTensor()
    return torchao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity)


def weight(plain: Tensor, law: Law, **options: Any) -> Any:
    """``plain`` [N, K] with dynamically quantised activations; ``options`` are those of the
    activations' quantiser.
    """
    torchao = pytest.importorskip("torchao.quantization")
    if law is FLOAT8_ROW and not plain.is_cuda and not cpu_multiplies_float8_rows():
        pytest.skip("this PyTorch multiplies float8 matrices with a scale for each row on GPUs only")
    if law is INT8_ROW:
        kwargs = importlib.import_module("torchao.quantization.quantize_.workflows.int8.int8_tensor").QuantizeTensorToInt8Kwargs
        return torchao.Int8Tensor.from_hp(plain.detach(), torchao.PerRow(), act_quant_kwargs=kwargs(torchao.PerRow(), **options))
    kwargs = importlib.import_module("torchao.quantization.quantize_.workflows.float8.float8_tensor").QuantizeTensorToFloat8Kwargs
    mm_config = importlib.import_module("torchao.float8.inference").Float8MMConfig(use_fast_accum=True)
    granularity = torchao.PerRow() if law.per_row else torchao.PerTensor()
    act = kwargs(torch.float8_e4m3fn, granularity, **options)
    return torchao.Float8Tensor.from_hp(plain.detach(), granularity=granularity, mm_config=mm_config, act_quant_kwargs=act)


@functools.cache
def cpu_multiplies_float8_rows() -> bool:
    """PyTorch 2.13 does, 2.11 doesn't."""
    values, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(values, values.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def quantise(model: nn.Module, law: Law, which: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """Every linear layer of which the name passes ``which`` and the shape suits the matrix
    products. A weight of 128 x 128 with one scale torchao takes for one of blocks, and fails.
    """
    for name, linear in model.named_modules():
        if suits(linear, law) and which(name):
            linear.weight = nn.Parameter(weight(linear.weight, law), requires_grad=False)  # type: ignore[arg-type]
    return model


def suits(module: nn.Module, law: Law) -> bool:
    """Whether ``module`` is a linear layer of such a shape."""
    if not isinstance(module, nn.Linear) or (law is FLOAT8_TENSOR and tuple(module.weight.shape) == (128, 128)):
        return False
    multiple = 16 if module.weight.is_cuda else 8
    return not (module.in_features % multiple or module.out_features % multiple)


def bfl_linear(linear: nn.Linear) -> Any:
    """Diffusers' ``BFLFP8RLinear`` of a layer, as its quantiser makes them of checkpoints."""
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight, bias = linear.weight, linear.bias
    layer = utils.BFLFP8RLinear(linear.in_features, linear.out_features, bias is not None, compute_dtype=weight.dtype, device=weight.device)
    values, layer.weight_scale = utils.quantize_fp8r(weight.detach())
    layer.weight, layer.bias = nn.Parameter(values, requires_grad=False), bias
    return layer


def quantise_bfl(model: nn.Module, which: Callable[[str], bool] = lambda name: True) -> nn.Module:
    """Every linear layer of which the name passes ``which``."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and which(name):
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = bfl_linear(linear)
    return model


def rows(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "plain") -> Tensor:
    """Rows of very different sizes; ``kind``: what is special about an element or two."""
    x = torch.randn(shape) * torch.randn(*shape[:-1], 1).mul(4).exp()
    if kind == "zeros":
        x = x * 1e-3
        x[..., 0, :] = 0
    if kind == "nan":
        x.view(-1)[3] = float("nan")
    if kind == "inf":
        x.view(-1)[4] = -float("inf")
    if kind == "any bits":
        x = torch.randint(-(2**15), 2**15, shape).to(torch.int16).view(torch.bfloat16).float()
    return x.to(dtype)
