"""The contract of the arguments of the ops of query and key, as named errors. When it runs: see
:mod:`ditnorm.ops.checks`.
"""

from typing import Any

import torch
from torch import Tensor

from . import expect
from .calls import JointQKNormRope, QKCall, QKNormRope
from .calls_backward import JointQKNormRopeBackward, QKNormRopeBackward
from .checks import in_double
from .expect import shape_of
from .options import FLOATS_AND_DOUBLE, PAIRS, QK_NORMS, ROUNDINGS
from .reference_qk import token_count


def check(call: QKCall) -> None:
    """Raises ``TypeError`` (kinds and dtypes) or ``ValueError`` (shapes, devices, combinations);
    the message names the argument.
    """
    _options(call)
    for prefix in _prefixes(call):
        streams = streams_of(call, prefix)
        _stream(call, prefix, streams)
        if isinstance(call, JointQKNormRope):
            _joined(call, prefix, streams)
    if isinstance(call, QKNormRope):
        _key_rotary(call)
    named = {name.replace("cos", "rotary").replace("sin", "rotary"): t for name, t in zip(call._fields, call, strict=True) if t is not None}
    expect.devices(named, call.query, "query")


def check_backward(call: QKNormRopeBackward | JointQKNormRopeBackward) -> None:
    """As :func:`check`, of an op that makes gradients."""
    check(call.forward)
    for name, x in {"query": call.query, "key": call.key}.items():
        tokens = x.shape[1] + (call.encoder_query.shape[1] if isinstance(call, JointQKNormRopeBackward) else 0)
        gradient = getattr(call, f"d_{name}")
        expect.tensor(f"d_{name}", gradient, (x.dtype,))
        shape = [x.shape[0], tokens, x.shape[-1] // call.head_dim, call.head_dim]
        if list(gradient.shape) != shape:
            raise ValueError(f"d_{name}: expected shape {shape}, got {shape_of(gradient)}")
    expect.devices({"d_query": call.d_query, "d_key": call.d_key}, call.query, "query")


def _key_rotary(call: QKNormRope) -> None:
    """Checks the key's own tables, and how tables of either go with ``pairs``."""
    expect.option("pairs", call.pairs, PAIRS)
    if call.key_cos is not None:
        if call.cos is None:
            raise ValueError("key_rotary: given without rotary")
        _rotary("key_rotary", call.key_cos, call.key_sin, call.head_dim, call.query, call.key.shape[1], call.key.shape[-1])
    if call.pairs == "neighbours":
        return
    for name, cos in {"rotary": call.cos, "key_rotary": call.key_cos}.items():
        if cos is not None and (cos.is_complex() or cos.shape[-1] != call.head_dim // 2):
            raise ValueError(f'{name}: with pairs="halves" expected (cos, sin) of width {call.head_dim // 2}, got {shape_of(cos)}')


def unfused(call: QKCall) -> str | None:
    """Why no kernel takes a call that ``check`` has passed, or None."""
    double = in_double(call)
    if double is not None:
        return double
    dtype = call.query.dtype
    for prefix in _prefixes(call):
        alike = list(streams_of(call, prefix).values())
        if call.rounding == "eager":
            alike += [getattr(call, f"{prefix}query_weight"), getattr(call, f"{prefix}key_weight")]
        for t in alike:
            if t is not None and t.dtype is not dtype:
                return f"query: fused for one dtype of all, got {dtype} and {t.dtype}"
        for cos in (getattr(call, f"{prefix}cos"), getattr(call, "key_cos", None)):
            if cos is not None and cos.dtype not in (torch.float32, torch.complex64):
                return f"{prefix}rotary: fused for float32 and complex64, got {cos.dtype}"
    return None


def streams_of(call: QKCall, prefix: str) -> dict[str, Tensor]:
    """The tensors [B, S, H * d] of a call's own stream, or of the one whose arguments' names have a
    prefix.
    """
    names = ("query", "key", "value") if isinstance(call, JointQKNormRope) else ("query", "key")
    return {name: getattr(call, f"{prefix}{name}") for name in names}


def _prefixes(call: QKCall) -> tuple[str, ...]:
    return ("",) if isinstance(call, QKNormRope) else ("", "encoder_")


def _joined(call: JointQKNormRope, prefix: str, streams: dict[str, Tensor]) -> None:
    """Checks that the tensors of a stream have the same tokens, and the widths of the call's own
    stream.
    """
    for name, x in streams.items():
        width = call.query.shape[-1] if prefix == "" else getattr(call, name).shape[-1]
        if x.shape[1] != streams["query"].shape[1] or x.shape[-1] != width:
            raise ValueError(
                f"{prefix}{name}: expected the tokens of {prefix}query {shape_of(streams['query'])} and one width for all, "
                f"got {shape_of(x)}"
            )


def tables(rotary: Any, name: str = "rotary") -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, or a ``TypeError`` that names the argument."""
    if isinstance(rotary, (tuple, list)) and len(rotary) == 2:
        cos, sin = rotary
        return cos, sin
    raise TypeError(f"{name}: expected None, a complex Tensor or a pair (cos, sin), got {type(rotary).__name__}")


def _options(call: QKCall) -> None:
    head_dim = call.head_dim
    expect.option("norm", call.norm, QK_NORMS)
    expect.option("rounding", call.rounding, ROUNDINGS)
    if isinstance(head_dim, bool) or not isinstance(head_dim, (int, torch.SymInt)):
        raise TypeError(f"head_dim: expected an int, got {type(head_dim).__name__}")
    expect.eps(call.eps)
    if isinstance(call, JointQKNormRope) and not isinstance(call.encoder_first, (bool, int, torch.SymBool)):
        raise TypeError(f"encoder_first: expected a bool, got {type(call.encoder_first).__name__}")
    if head_dim < 1:
        raise ValueError(f"head_dim: expected at least 1, got {head_dim}")


def _stream(call: QKCall, prefix: str, streams: dict[str, Tensor]) -> None:
    """Checks one stream's tensors against ``query``, the op's first argument."""
    query, head_dim = call.query, call.head_dim
    for name, x in streams.items():
        expect.tensor(f"{prefix}{name}", x, FLOATS_AND_DOUBLE)
        if x.dim() != 3 or x.shape[-1] < 1 or x.shape[-1] % head_dim != 0:
            raise ValueError(f"{prefix}{name}: expected shape [B, S, H * {head_dim}] (head_dim {head_dim}), got {shape_of(x)}")
        if x.shape[0] != query.shape[0]:
            raise ValueError(f"{prefix}{name}: expected the batch of query, {query.shape[0]}, got {shape_of(x)}")
        weight = getattr(call, f"{prefix}{name}_weight", None)  # a value has none
        if weight is None:
            continue
        expect.tensor(f"{prefix}{name}_weight", weight, FLOATS_AND_DOUBLE)
        if tuple(weight.shape) not in ((head_dim,), (x.shape[-1],)):
            raise ValueError(
                f"{prefix}{name}_weight: expected shape [{head_dim}] (per head) or [{x.shape[-1]}] (across heads), got {shape_of(weight)}"
            )
    cos, sin = getattr(call, f"{prefix}cos"), getattr(call, f"{prefix}sin")
    if cos is not None:
        rotated = list(streams.values()) if getattr(call, "key_cos", None) is None else [query]
        width = rotated[0].shape[-1] if all(x.shape[-1] == rotated[0].shape[-1] for x in rotated) else None
        _rotary(f"{prefix}rotary", cos, sin, head_dim, query, min(x.shape[1] for x in rotated), width)


def _rotary(name: str, cos: Tensor, sin: Tensor | None, head_dim: int, query: Tensor, tokens: int, width: int | None) -> None:
    """``tokens``, ``width``: of the rows that are rotated, None where they are of several."""
    if head_dim % 2 != 0:
        raise ValueError(f"head_dim: expected an even number with {name}, got {head_dim}")
    expect.tensor(name, cos, (torch.complex64, torch.complex128) if sin is None and cos.is_complex() else FLOATS_AND_DOUBLE)
    if sin is None and not cos.is_complex():
        raise TypeError(f"{name}: expected a complex Tensor or a pair (cos, sin), got one Tensor of {cos.dtype}")
    if sin is not None:
        expect.tensor(name, sin, FLOATS_AND_DOUBLE)
        if sin.shape != cos.shape or sin.dtype is not cos.dtype:
            raise ValueError(f"{name}: expected cos and sin alike, got {shape_of(cos)} of {cos.dtype} and {shape_of(sin)} of {sin.dtype}")
    widths = (head_dim // 2,) if sin is None else (head_dim // 2, head_dim)
    heads = "1" if width is None else f"1 or {width // head_dim}"
    of_heads = cos.dim() != 4 or cos.shape[2] == 1 or (width is not None and cos.shape[2] == width // head_dim)
    batch = cos.dim() == 2 or (cos.dim() in (3, 4) and cos.shape[0] in (1, query.shape[0]))
    if not (of_heads and batch and cos.shape[-1] in widths and token_count(cos) <= tokens):
        raise ValueError(
            f"{name}: got {shape_of(cos)}; expected [S, n], [{query.shape[0]} or 1, S, n] or [{query.shape[0]} or 1, S, {heads}, n] with "
            f"S at most {tokens} and n {' or '.join(map(str, widths))}"
        )
