"""The contract of the arguments of QK normalisation with rotary embedding, as named errors. When it runs: see :mod:`ditnorm.ops.checks`."""

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, ROUNDINGS, UnfusedDtypesError, _option, _shape, _tensor, autocasts
from .reference_qk import token_count

NORMS = ("rms", "diffusers_rms")

_TABLES = (*FLOATS, torch.float64)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    norm: str,
    eps: float,
    rounding: str,
) -> None:
    """Arguments as of the op. Raises ``TypeError`` or ``ValueError`` that names one; ``UnfusedDtypesError`` says that no other is wrong."""
    _options(head_dim, norm, eps, rounding)
    _stream("", {"query": query, "key": key}, {"query": query_weight, "key": key_weight}, cos, sin, head_dim, query)
    _dtypes(rounding, query, {"key": key}, cos)
    if rounding == "eager" and not autocasts(query):
        fused_dtypes(query, key, query_weight, key_weight, cos)


def joint_qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    encoder_query: Tensor,
    encoder_key: Tensor,
    encoder_value: Tensor,
    encoder_query_weight: Tensor | None,
    encoder_key_weight: Tensor | None,
    encoder_cos: Tensor | None,
    encoder_sin: Tensor | None,
    head_dim: int,
    norm: str,
    eps: float,
    encoder_first: bool,
    rounding: str,
) -> None:
    """Arguments as of the op. Raises ``TypeError`` or ``ValueError`` that names one; ``UnfusedDtypesError`` says that no other is wrong."""
    _options(head_dim, norm, eps, rounding)
    own = {"query": query, "key": key, "value": value}
    encoder = {"query": encoder_query, "key": encoder_key, "value": encoder_value}
    _stream("", own, {"query": query_weight, "key": key_weight}, cos, sin, head_dim, query)
    encoder_weights = {"query": encoder_query_weight, "key": encoder_key_weight}
    _stream("encoder_", encoder, encoder_weights, encoder_cos, encoder_sin, head_dim, query)
    for prefix, stream in (("", own), ("encoder_", encoder)):
        for name, x in stream.items():
            reference = stream["query"] if prefix == "" else own[name]
            if x.shape[1] != stream["query"].shape[1] or x.shape[-1] != reference.shape[-1]:
                raise ValueError(
                    f"{prefix}{name}: expected the tokens of {prefix}query {_shape(stream['query'])} and one width for all, got {_shape(x)}"
                )
    _dtypes(rounding, query, {"key": key, "value": value}, cos)
    _dtypes(rounding, query, {f"encoder_{name}": x for name, x in encoder.items()}, encoder_cos)
    if rounding == "eager" and not autocasts(query):
        fused_dtypes(query, key, query_weight, key_weight, cos, value)
        fused_dtypes(query, encoder_key, encoder_query_weight, encoder_key_weight, encoder_cos, encoder_query, encoder_value)


def tables(rotary: Any) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, or a ``TypeError`` that names ``rotary``."""
    if isinstance(rotary, (tuple, list)) and len(rotary) == 2:
        cos, sin = rotary
        return cos, sin
    raise TypeError(f"rotary: expected None, a complex Tensor or a pair (cos, sin), got {type(rotary).__name__}")


def fused_dtypes(
    query: Tensor, key: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None, *others: Tensor
) -> None:
    """Raises ``UnfusedDtypesError`` where ``rounding="eager"`` with these dtypes isn't fused."""
    for t in (key, query_weight, key_weight, *others):
        if t is not None and t.dtype is not query.dtype:
            raise UnfusedDtypesError(f'query: rounding="eager" is fused for one dtype of all, got {query.dtype} and {t.dtype}')
    if cos is not None and cos.dtype not in (torch.float32, torch.complex64):
        raise UnfusedDtypesError(f"rotary: expected float32 or complex64, got {cos.dtype}")


def _options(head_dim: int, norm: str, eps: float, rounding: str) -> None:
    _option("norm", norm, NORMS)
    _option("rounding", rounding, ROUNDINGS)
    if isinstance(head_dim, bool) or not isinstance(head_dim, (int, torch.SymInt)):
        raise TypeError(f"head_dim: expected an int, got {type(head_dim).__name__}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    if head_dim < 1:
        raise ValueError(f"head_dim: expected at least 1, got {head_dim}")


def _dtypes(rounding: str, query: Tensor, others: dict[str, Tensor], cos: Tensor | None) -> None:
    """What ``"single"`` takes; ``"eager"`` promotes as PyTorch does."""
    if rounding == "eager":
        return
    for name, x in others.items():
        if x.dtype is not query.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}")
    if cos is not None and cos.dtype not in (torch.float32, torch.complex64):
        raise TypeError(f"rotary: expected dtype float32 or complex64, got {cos.dtype}")


def _stream(
    prefix: str,
    streams: dict[str, Tensor],
    weights: dict[str, Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    query: Tensor,
) -> None:
    """Checks one stream's tensors against ``query``, the op's first argument."""
    for name, x in streams.items():
        _tensor(f"{prefix}{name}", x, FLOATS)
        if x.dim() != 3 or x.shape[-1] < 1 or x.shape[-1] % head_dim != 0:
            raise ValueError(f"{prefix}{name}: expected shape [B, S, H * {head_dim}] (head_dim {head_dim}), got {_shape(x)}")
        if x.shape[0] != query.shape[0]:
            raise ValueError(f"{prefix}{name}: expected the batch of query, {query.shape[0]}, got {_shape(x)}")
        _same_device(f"{prefix}{name}", x, query)
        weight = weights.get(name)
        if weight is None:
            continue
        _tensor(f"{prefix}{name}_weight", weight, FLOATS)
        if tuple(weight.shape) not in ((head_dim,), (x.shape[-1],)):
            raise ValueError(
                f"{prefix}{name}_weight: expected shape [{head_dim}] (per head) or [{x.shape[-1]}] (across heads), got {_shape(weight)}"
            )
        _same_device(f"{prefix}{name}_weight", weight, query)
    if cos is not None:
        shortest = min(x.shape[1] for name, x in streams.items())
        _rotary(f"{prefix}rotary", cos, sin, head_dim, query, shortest)


def _rotary(name: str, cos: Tensor, sin: Tensor | None, head_dim: int, query: Tensor, tokens: int) -> None:
    if head_dim % 2 != 0:
        raise ValueError(f"head_dim: expected an even number with {name}, got {head_dim}")
    _tensor(name, cos, (torch.complex64,) if sin is None and cos.is_complex() else _TABLES)
    if sin is None and not cos.is_complex():
        raise TypeError(f"{name}: expected a complex Tensor or a pair (cos, sin), got a Tensor of {cos.dtype}")
    if sin is not None:
        _tensor(name, sin, _TABLES)
        if sin.shape != cos.shape or sin.dtype is not cos.dtype:
            raise ValueError(f"{name}: expected cos and sin alike, got {_shape(cos)} of {cos.dtype} and {_shape(sin)} of {sin.dtype}")
    widths = (head_dim // 2,) if sin is None else (head_dim // 2, head_dim)
    per_head = cos.dim() != 4 or cos.shape[2] == 1
    batch = cos.dim() == 2 or (cos.dim() in (3, 4) and cos.shape[0] in (1, query.shape[0]))
    if not (per_head and batch and cos.shape[-1] in widths and token_count(cos) <= tokens):
        raise ValueError(
            f"{name}: got {_shape(cos)}; expected [S, n], [{query.shape[0]} or 1, S, n] or [{query.shape[0]} or 1, S, 1, n] with "
            f"S at most {tokens} and n {' or '.join(map(str, widths))}"
        )
    for table in (cos, sin):
        if table is not None:
            _same_device(name, table, query)


def _same_device(name: str, t: Tensor, query: Tensor) -> None:
    if t.device != query.device:
        raise ValueError(f"{name}: expected the device of query, {query.device}, got {t.device}")
