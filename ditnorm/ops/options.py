"""The values that the options of ops take.

Users pass a name ("layer", "eager") or a value. An op is given its place in ``NORMS``,
``QK_NORMS``, ``PAIRS``, ``ROUNDINGS``, ``LAWS`` or ``HALVES``, a number. The C++ side has the same
order.
"""

from typing import Annotated

import torch
from torch import Tensor

from .quantization import LAWS, Law

NORMS = ("layer", "rms", "fp32_layer", "diffusers_rms")
QK_NORMS = ("rms", "diffusers_rms")
PAIRS = ("neighbours", "halves", "halves, rounded")
"""Which elements of a head a rotary embedding turns against each other: ``j`` and ``j + 1``, or
``j`` and ``j + d / 2``. The last is the second as CUDA computes it with older releases of PyTorch.
"""
HALVES_OF_CUDA = PAIRS[1 if torch.__version__ >= (2, 11) else 2]  # type: ignore[operator]
"""Up to PyTorch 2.10 ``addcmul_`` rounds the product on CUDA before it adds it (read off the
machine code of 2.10 and 2.11 for compute capability 9.0).
"""
ROUNDINGS = ("single", "eager")
HALVES = (torch.float16, torch.bfloat16)

FLOATS = (torch.float32, *HALVES)
"""The dtypes that the kernels take."""
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)
"""The dtypes that the ops take."""

Norm = Annotated[str, NORMS]
QKNorm = Annotated[str, QK_NORMS]
Pairs = Annotated[str, PAIRS]
Rounding = Annotated[str, ROUNDINGS]
Quantiser = Annotated[Law, LAWS]
Half = Annotated[torch.dtype, HALVES]

RMS_EPS = torch.finfo(torch.float32).eps
"""The default of torch's ``rms_norm`` for all dtypes but float64: the resolution of the dtype that
it computes in.
"""


def default_eps(norm: str, x: Tensor) -> float:
    """The default of torch's function; 1e-5 for diffusers' norms."""
    if norm != "rms":
        return 1e-5
    return torch.finfo(torch.float64).eps if x.dtype is torch.float64 else RMS_EPS
