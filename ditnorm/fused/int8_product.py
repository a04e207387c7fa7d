"""The int32 product of int8 matrices, of few rows too, with the bits of torchao's.

PyTorch multiplies int8 matrices of 17 rows and more on a GPU. Of fewer torchao makes float32
numbers of both matrices, in each call of all of the weight. A sum of integers whose absolute values
add up to no more than 2**24 is exact in float32, in any order: then it is what PyTorch gives where
rows of zeros stand below.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..swapping.torch_private import int_mm
from .quantized_weights import Operand

_FEWEST_ROWS = 17
_PADDED = 32  # rows that fewer are padded to
_LARGEST = 128  # the largest absolute value of an int8
_EXACT = 2**24  # float32 has every integer up to this one
_PART = 1024  # rows of a weight whose absolute values are added up at a time


def int8_product(values: Tensor, operand: Operand) -> Tensor:
    """``values`` [rows, K] by the weight [K, N] -> int32 [rows, N]."""
    if values.shape[0] >= _FEWEST_ROWS or not values.is_cuda:
        return int_mm(values, operand.values)
    if is_exact_in_float32(values, operand):
        return padded_product(values, operand.values)
    return torch.matmul(values.float(), operand.values.contiguous().float()).to(torch.int32)  # torchao's way


def padded_product(values: Tensor, weight: Tensor) -> Tensor:
    """The product of few rows, with rows of zeros below."""
    rows = values.shape[0]
    return int_mm(F.pad(values, (0, 0, 0, _PADDED - rows)), weight)[:rows]


def is_exact_in_float32(values: Tensor, operand: Operand) -> bool:
    """Whether float32 is exact: the terms of each sum are known to be small enough.

    Mostly the weight tells that for whatever it is multiplied by, once and for all. Where it
    doesn't, the host waits for the values in each call; while a graph is captured it can't, and the
    answer is no.
    """
    capturing = values.is_cuda and torch.cuda.is_current_stream_capturing()
    largest = _largest_sum(operand, may_wait=not capturing)
    if largest is not None and largest * _LARGEST <= _EXACT:
        return True
    return not capturing and int(values.int().abs().sum(-1).amax()) * _LARGEST <= _EXACT


def _largest_sum(operand: Operand, may_wait: bool) -> int | None:
    """The largest sum of absolute values in a column of the weight. None: it isn't known."""
    weight = operand.source()
    if weight is None or weight.is_inference():  # nobody counts what is written into it
        return None
    if operand.largest_sum is None or operand.largest_sum[0] != weight._version:
        if not may_wait:
            return None
        sums = [part.int().abs().sum(-1).amax() for part in weight.split(_PART)]
        operand.largest_sum = weight._version, int(torch.stack(sums).amax())
    return operand.largest_sum[1]
