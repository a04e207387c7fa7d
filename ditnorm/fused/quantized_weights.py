"""Quantised weights of torchao: the law by which activations are quantised for a weight, and the
weight as a product takes it.

A weight carries its configuration. How the installed torchao computes with it is known by
fingerprint. What isn't known is named, and torchao serves it.
"""

import functools
import importlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.quantization import FLOAT8_ROW, FLOAT8_TENSOR, INT8_ROW, Law
from ..swapping.fingerprint import fingerprint, fingerprint_of_all
from ..swapping.originals import full_name

_PRIMITIVES = "torchao.quantization.quant_primitives"
_COMMON = {
    "torchao.utils": ("_dispatch__torch_function__",),
    "torchao.quantization.utils": ("get_block_size",),
    "torchao.quantization.quantize_.common.quantize_tensor_kwargs": ("_choose_quant_func_and_quantize_tensor",),
}
_FLOAT8_MODULE = "torchao.quantization.quantize_.workflows.float8.float8_tensor"
_FLOAT8: Mapping[str, tuple[str, ...]] = _COMMON | {
    _FLOAT8_MODULE: ("Float8Tensor.from_hp", "_float8_addmm_impl"),
    "torchao.float8.inference": (
        "preprocess_data",
        "preprocess_scale",
        "addmm_float8_unwrapped_inference",
        "_is_rowwise_scaled",
        "_is_128_128_scaled",
        "_is_tensorwise_scaled",
    ),
    "torchao.float8.float8_utils": ("is_row_major",),
    _PRIMITIVES: (
        "_choose_scale_float8",
        "_get_reduction_params",
        "_maybe_expand_scale_to_tensor_shape",
        "_quantize_affine_float8",
        "_RoundToFloat8.forward",
    ),
}
_INT8_MODULE = "torchao.quantization.quantize_.workflows.int8.int8_tensor"
_INT8: Mapping[str, tuple[str, ...]] = _COMMON | {
    _INT8_MODULE: ("Int8Tensor.from_hp",),
    "torchao.kernel.intmm": ("int_scaled_matmul", "safe_int_mm"),
    _PRIMITIVES: (
        "choose_qparams_affine",
        "_choose_qparams_affine",
        "_get_reduction_params",
        "quantize_affine",
        "_quantize_affine",
        "_quantize_affine_no_dtype_cast",
        "_Round.forward",
    ),
}
# The function that serves F.linear has no name that could be looked up, so it stands beside the
# others.
_KNOWN_FLOAT8 = frozenset({("f6806f318387", "cd32637bc883")})  # 0.18.0
_KNOWN_INT8 = frozenset({("58f780637a59", "74711f18cb51")})  # 0.18.0

# What users change of a weight that has been used, and the law or the product depends on.
_FLOAT8_CONFIGURATION = attrgetter("act_quant_kwargs", "mm_config", "kernel_preference")
_INT8_CONFIGURATION = attrgetter("act_quant_kwargs", "act_pre_scale", "act_quant_scale")

Reader = Callable[[Any], Law | str]
"""A weight -> the law of its activations, or why it has none that is fused."""


def quantises_activations(weight: Tensor) -> bool:
    """Whether ``weight`` is one of torchao's tensors, and not the only one that is quantised."""
    return type(weight).__module__.partition(".")[0] == "torchao" and getattr(weight, "act_quant_kwargs", None) is not None


def law_of(weight: Tensor) -> Law | str:
    """The law by which activations are quantised for ``weight``, or why torchao itself serves
    it.
    """
    return _reader(type(weight))(weight)


class Operand:
    """A weight [N, K] as a product takes it.

    It is made once a weight: reading a configuration takes longer than a call should.
    """

    __slots__ = ("configuration", "fast", "largest_sum", "law", "places", "read", "read_scale", "scale", "source", "values", "width")

    def __init__(self, weight: Any, law: Law) -> None:
        source, key = weight.qdata, id(weight.qdata)
        self.source: Callable[[], Tensor | None] = weakref.ref(source, lambda _: _operands.pop(key, None))
        """``qdata`` itself, as long as somebody has it. (PyTorch moves no weight that somebody has
        a weak reference to.)
        """
        self.read: Callable[[Any], Any] = _INT8_CONFIGURATION if law is INT8_ROW else _FLOAT8_CONFIGURATION
        self.read_scale, self.configuration = weight.scale, self.read(weight)
        """What was read of ``weight`` beside that."""
        self.places = source.data_ptr(), weight.scale.data_ptr()
        """Where both were: who swaps weights puts others in, as ``.data``."""
        self.law = law
        self.values: Tensor = source.data.t()
        """[K, N]. No view of it, which would keep it alive."""
        self.scale: Tensor = weight.scale if law is INT8_ROW else weight.scale.t()
        """As the product of the law takes it."""
        self.fast: bool = law is not INT8_ROW and weight.mm_config.use_fast_accum
        """Whether float8 products may be added up with fewer digits."""
        self.width: int = self.values.shape[0]
        """K"""
        self.largest_sum: tuple[int, int] | None = None
        """See :func:`ditnorm.fused.int8_product.is_exact_in_float32`."""

    def takes(self, shape: Sequence[int], dtype: torch.dtype, bias: Tensor | None) -> bool:
        """Whether an activation of this shape and dtype is quantised for it here."""
        if len(shape) < 2 or shape[-1] != self.width or 0 in shape:
            return False
        return bias is None or bias.dtype is dtype


_operands: dict[int, Operand] = {}


def operand_of(weight: Any) -> Operand | None:
    """The operand that ``weight`` is; None where its own library serves it."""
    source: Any = getattr(weight, "qdata", None)
    found = _operands.get(id(source))
    if (
        found is not None
        and weight.scale is found.read_scale
        and found.read(weight) == found.configuration
        and (source.data_ptr(), found.read_scale.data_ptr()) == found.places
        and found.source() is source
    ):
        return found
    law = law_of(weight)
    if not isinstance(law, Law):
        return None
    found = _operands[id(source)] = Operand(weight, law)
    return found


@functools.cache
def _reader(kind: type) -> Reader:
    name = full_name(kind)
    if kind.__module__.partition(".")[0] == "torchao":
        if kind.__qualname__ == "Float8Tensor":
            return _float8_reader(kind)
        if kind.__qualname__ == "Int8Tensor":
            return _int8_reader(kind)
    return lambda weight: f"{name} is not a weight that ditnorm knows"


def _unknown(kind: type, functions: Mapping[str, tuple[str, ...]], known: frozenset[tuple[str, str]]) -> str | None:
    """Why the installed torchao isn't one that ditnorm knows, or None."""
    linear = getattr(kind, "_TORCH_FN_TABLE", {}).get(kind, {}).get(F.linear)
    found = fingerprint(getattr(linear, "__wrapped__", linear)), fingerprint_of_all(functions)
    return None if found in known else f"this version of torchao is not one that ditnorm knows (fingerprint: {found[0]} {found[1]})"


def _float8_reader(kind: type) -> Reader:
    unknown = _unknown(kind, _FLOAT8, _KNOWN_FLOAT8)
    if unknown is not None:
        return lambda weight: unknown
    module = importlib.import_module(_FLOAT8_MODULE)
    per_row, per_tensor = module.PerRow, module.PerTensor
    automatic, torch_kernels = module.KernelPreference.AUTO, module.KernelPreference.TORCH
    mslk = module._is_mslk_available()

    def read(weight: Any) -> Law | str:
        how, config, values = weight.act_quant_kwargs, weight.mm_config, weight.qdata
        if how is None:
            return "only its weights are quantised"
        granularity, (rows, width) = how.granularity, values.shape
        if type(granularity) is per_row and granularity.dim == -1 and weight.block_size == [1, width]:
            law = FLOAT8_ROW
        elif type(granularity) is per_tensor and weight.block_size == [rows, width]:
            law = FLOAT8_TENSOR
        else:
            return f"activations quantised {granularity}, weights in blocks of {weight.block_size}"
        if how.float8_dtype is not torch.float8_e4m3fn or values.dtype is not torch.float8_e4m3fn:
            return f"activations in {how.float8_dtype}, weights in {values.dtype}"
        if how.hp_value_lb is not None or how.hp_value_ub is not None:
            return "activations have bounds"
        for preference in (how.kernel_preference, weight.kernel_preference):
            if preference is automatic and mslk and law is FLOAT8_ROW:
                return "torchao takes MSLK's kernels"
            if preference is not automatic and preference is not torch_kernels:
                return f"{preference}"
        if config is None or config.pad_inner_dim or not values.is_contiguous():
            return "torchao copies its weights in each call"
        return law

    return read


def _int8_reader(kind: type) -> Reader:
    unknown = _unknown(kind, _INT8, _KNOWN_INT8)
    if unknown is not None:
        return lambda weight: unknown
    module = importlib.import_module(_INT8_MODULE)
    per_row, symmetric = module.PerRow, module.MappingType.SYMMETRIC
    tuned = importlib.import_module("torchao.kernel.intmm").AUTOTUNER_ENABLE

    def read(weight: Any) -> Law | str:
        how, values = weight.act_quant_kwargs, weight.qdata
        if how is None:
            return "only its weights are quantised"
        granularity, (rows, width) = how.granularity, values.shape
        if type(granularity) is not per_row or granularity.dim != -1 or weight.block_size != [1, width]:
            return f"activations quantised {granularity}, weights in blocks of {weight.block_size}"
        if how.mapping_type is not symmetric or how.reduce_range or weight.reduce_range:
            return "activations quantised asymmetrically or in a reduced range"
        if weight.act_pre_scale is not None or weight.act_quant_scale is not None:
            return "activations quantised with scales known beforehand"
        if rows % 8 or width % 8:
            return "torchao multiplies on the CPU: its shape isn't a multiple of 8"
        return "TORCHAO_AUTOTUNER_ENABLE" if tuned else INT8_ROW

    return read
