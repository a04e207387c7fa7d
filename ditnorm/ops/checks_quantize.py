"""The contract of the arguments of the quantising ops, as named errors. When it runs: see
:mod:`ditnorm.ops.checks`.
"""

import torch
from torch import Tensor

from . import checks, checks_activation, expect
from .calls_quantize import DequantizeProduct, Quantize, QuantizedActivationCall, QuantizedSiteCall
from .expect import shape_of
from .options import FLOATS, HALVES
from .quantization import FLOAT8_CAPABILITY, LAWS, Law


def check(call: Quantize) -> None:
    """Raises ``TypeError`` (kinds and dtypes) or ``ValueError`` (shapes, devices); the message
    names the argument.
    """
    expect.tensor("x", call.x, FLOATS)
    expect.rows(call.x)
    check_law(call.law, call.x)


def check_site(call: QuantizedSiteCall) -> None:
    """As :func:`check`."""
    checks.check(call.site)
    check_law(call.law, call.x)


def unfused_site(call: QuantizedSiteCall) -> str | None:
    """Why no kernel takes a call that :func:`check_site` has passed, or None."""
    return checks.unfused(call.site)


def check_activation(call: QuantizedActivationCall) -> None:
    """As :func:`check`."""
    checks_activation.check(call.activation)
    check_law(call.law, call.x)


def unfused_activation(call: QuantizedActivationCall) -> str | None:
    """Why no kernel takes a call that :func:`check_activation` has passed, or None."""
    return checks_activation.unfused(call.activation)


def like_activation(call: QuantizedActivationCall) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results."""
    return like_quantized(checks_activation.like(call.activation), call.law)


def check_law(law: Law, x: Tensor) -> None:
    """Whether ``x`` can be quantised by ``law``, where it is."""
    if law not in LAWS:
        raise ValueError(f"law: expected one of {', '.join(map(str, LAWS))}, got {law!r}")
    if not law.per_row and x.numel() == 0:
        raise ValueError(f"x: {law} needs the largest value of all, got {shape_of(x)}")
    if law.dtype is torch.float8_e4m3fn and x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < FLOAT8_CAPABILITY:
            raise ValueError(f"law: {law} needs a GPU of compute capability 8.9, got {'.'.join(map(str, capability))}")


def check_product(call: DequantizeProduct) -> None:
    """As :func:`check`."""
    expect.tensor("product", call.product, (torch.int32,))
    if call.product.dim() != 2 or call.product.shape[1] % 4:
        raise ValueError(f"product: expected shape [rows, N], N a multiple of 4, got {shape_of(call.product)}")
    rows, width = call.product.shape
    if call.dtype not in HALVES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, HALVES))}, got {call.dtype}")
    for name, t, count, dtype in (
        ("scale", call.scale, rows, torch.float32),
        ("weight_scale", call.weight_scale, width, torch.float32),
        ("bias", call.bias, width, call.dtype),
    ):
        if t is not None:
            expect.tensor(name, t, (dtype,))
            if t.numel() != count:
                raise ValueError(f"{name}: expected {count} values, got {shape_of(t)}")
    for name, t in (("product", call.product), ("scale", call.scale), ("weight_scale", call.weight_scale), ("bias", call.bias)):
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous Tensor, got strides {list(t.stride())}")
    expect.devices(dict(zip(call._fields, call, strict=True)), call.product, "product")


def like_quantized(x: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    """Empty tensors like the values and the scale of ``x``."""
    rows = x.shape[:-1].numel()
    return x.new_empty(rows, x.shape[-1], dtype=law.dtype), x.new_empty(rows if law.per_row else 1, 1, dtype=torch.float32)
