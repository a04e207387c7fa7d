"""The ops as PyTorch operators (``torch.ops.ditnorm``): schemas, fakes, the Python body, and the compiled library over it.

One Python body serves every device; ``_C.so`` takes CUDA over at the first CUDA call. Not earlier: asking the driver for its
version at import would break CUDA in forked children.
"""

import ctypes
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import checks, checks_qk, reference, reference_qk
from ..ops.checks import NORMS, ROUNDINGS

_lib = torch.library.Library("ditnorm", "DEF")
_lib.define(
    "norm_scale_shift(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? scale_table, Tensor? shift_table, "
    "Tensor? index, int norm, float eps, int rounding) -> Tensor"
)
_lib.define(
    "scale_residual_norm_scale_shift(Tensor residual, Tensor x, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
    "Tensor? gate_table, Tensor? scale_table, Tensor? shift_table, Tensor? index, int norm, float eps, int rounding) -> (Tensor, Tensor)"
)
_lib.define("scale_residual(Tensor residual, Tensor x, Tensor? gate, Tensor? gate_table, Tensor? index, int rounding) -> Tensor")
_lib.define(
    "qk_norm_rope(Tensor query, Tensor key, Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin, int head_dim, int norm, "
    "float eps, int rounding) -> (Tensor, Tensor)"
)
_lib.define(
    "joint_qk_norm_rope(Tensor query, Tensor key, Tensor value, Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin, "
    "Tensor encoder_query, Tensor encoder_key, Tensor encoder_value, Tensor? encoder_query_weight, Tensor? encoder_key_weight, "
    "Tensor? encoder_cos, Tensor? encoder_sin, int head_dim, int norm, float eps, bool encoder_first, int rounding) "
    "-> (Tensor, Tensor, Tensor)"
)

ops = torch.ops.ditnorm
OPS = ("norm_scale_shift", "scale_residual_norm_scale_shift", "scale_residual", "qk_norm_rope", "joint_qk_norm_rope")

unavailable: str | None = None
"""Why the compiled kernels can't serve CUDA tensors, or None. Known for certain after the first CUDA call."""

library: Path | None = None
"""The compiled library, once loaded."""

path = "cuda"
"""What the compiled library's calls are counted as: ``"cuda"``, or ``"cpu_sim"`` for a build of the kernels for the host."""

_lock = threading.Lock()
_reference_calls = dict.fromkeys(OPS, 0)


def counts() -> dict[tuple[str, str], int]:
    """Calls of each op in this process: ``(op, "reference" or kernels.path) -> n``. Replays of CUDA graphs aren't counted."""
    compiled = (ctypes.c_int64 * len(OPS))()
    if library is not None:
        ctypes.CDLL(str(library)).ditnorm_counts(compiled)
    return {(op, path): n for op, n in zip(OPS, compiled, strict=True)} | {(op, "reference"): n for op, n in _reference_calls.items()}


def _norm_scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    index: Tensor | None,
    norm: int,
    eps: float,
    rounding: int,
) -> Tensor:
    if _compiled_serves(x):
        return ops.norm_scale_shift.default(x, scale, shift, weight, bias, scale_table, shift_table, index, norm, eps, rounding)
    checks.norm_scale_shift(x, scale, shift, weight, bias, scale_table, shift_table, index, NORMS[norm], eps, ROUNDINGS[rounding])
    _count("norm_scale_shift", x, index, scale, shift)
    return reference.norm_scale_shift(x, scale, shift, weight, bias, scale_table, shift_table, index, NORMS[norm], eps, ROUNDINGS[rounding])


def _scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_table: Tensor | None,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    index: Tensor | None,
    norm: int,
    eps: float,
    rounding: int,
) -> tuple[Tensor, Tensor]:
    if _compiled_serves(x):
        return ops.scale_residual_norm_scale_shift.default(
            residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index, norm, eps, rounding
        )
    checks.scale_residual_norm_scale_shift(
        residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index, NORMS[norm], eps, ROUNDINGS[rounding]
    )
    _count("scale_residual_norm_scale_shift", x, index, gate, scale, shift)
    return reference.scale_residual_norm_scale_shift(
        residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index, NORMS[norm], eps, ROUNDINGS[rounding]
    )


def _scale_residual(
    residual: Tensor, x: Tensor, gate: Tensor | None, gate_table: Tensor | None, index: Tensor | None, rounding: int
) -> Tensor:
    if _compiled_serves(x):
        return ops.scale_residual.default(residual, x, gate, gate_table, index, rounding)
    checks.scale_residual(residual, x, gate, gate_table, index, ROUNDINGS[rounding])
    _count("scale_residual", x, index, gate)
    return reference.scale_residual(residual, x, gate, gate_table, index, ROUNDINGS[rounding])


def _qk_norm_rope(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if _compiled_serves(query):
        return ops.qk_norm_rope.default(query, *arguments)
    *others, head_dim, norm, eps, rounding = arguments
    options: tuple[Any, ...] = (head_dim, checks_qk.NORMS[norm], eps, ROUNDINGS[rounding])
    checks_qk.qk_norm_rope(query, *others, *options)
    count_reference("qk_norm_rope")
    return reference_qk.qk_norm_rope(query, *others, *options)


def _joint_qk_norm_rope(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _compiled_serves(query):
        return ops.joint_qk_norm_rope.default(query, *arguments)
    *others, head_dim, norm, eps, encoder_first, rounding = arguments
    options: tuple[Any, ...] = (head_dim, checks_qk.NORMS[norm], eps, encoder_first, ROUNDINGS[rounding])
    checks_qk.joint_qk_norm_rope(query, *others, *options)
    count_reference("joint_qk_norm_rope")
    return reference_qk.joint_qk_norm_rope(query, *others, *options)


def _count(op: str, x: Tensor, index: Tensor | None, *modulations: Tensor | None) -> None:
    if index is not None and x.device.type == "cpu":
        checks.index_range(index, *modulations)
    count_reference(op)


def count_reference(op: str) -> None:
    """Counts a call that PyTorch's operations serve."""
    _reference_calls[op] += 1


# The fakes check too: a call with one meta tensor among real ones is dispatched to them and must not return uninitialised memory.
def _fake_norm_scale_shift(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, norm, eps, rounding = arguments
    checks.norm_scale_shift(x, *tensors, NORMS[norm], eps, ROUNDINGS[rounding])  # type: ignore[call-arg]
    return x.new_empty(x.shape)


def _fake_scale_residual_norm_scale_shift(residual: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, norm, eps, rounding = arguments
    checks.scale_residual_norm_scale_shift(residual, x, *tensors, NORMS[norm], eps, ROUNDINGS[rounding])  # type: ignore[call-arg]
    return x.new_empty(x.shape), residual.new_empty(x.shape)


def _fake_scale_residual(
    residual: Tensor, x: Tensor, gate: Tensor | None, gate_table: Tensor | None, index: Tensor | None, rounding: int
) -> Tensor:
    checks.scale_residual(residual, x, gate, gate_table, index, ROUNDINGS[rounding])
    return residual.new_empty(x.shape)


def _fake_qk_norm_rope(query: Tensor, key: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *others, head_dim, norm, eps, rounding = arguments
    options: tuple[Any, ...] = (head_dim, checks_qk.NORMS[norm], eps, ROUNDINGS[rounding])
    checks_qk.qk_norm_rope(query, key, *others, *options)
    query, key = (t.unflatten(-1, (-1, head_dim)) for t in (query, key))
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _fake_joint_qk_norm_rope(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, head_dim, norm, eps, encoder_first, rounding = arguments
    options: tuple[Any, ...] = (head_dim, checks_qk.NORMS[norm], eps, encoder_first, ROUNDINGS[rounding])
    checks_qk.joint_qk_norm_rope(query, *others, *options)
    encoder_query = others[6]
    batch, tokens, width = query.shape
    q, k, v = (query.new_empty(batch, tokens + encoder_query.shape[1], width // head_dim, head_dim) for _ in range(3))
    return q, k, v


_bodies: tuple[Any, ...] = (_norm_scale_shift, _scale_residual_norm_scale_shift, _scale_residual, _qk_norm_rope, _joint_qk_norm_rope)
_fakes: tuple[Any, ...] = (
    _fake_norm_scale_shift,
    _fake_scale_residual_norm_scale_shift,
    _fake_scale_residual,
    _fake_qk_norm_rope,
    _fake_joint_qk_norm_rope,
)
for _op, _body, _fake in zip(OPS, _bodies, _fakes, strict=True):
    _lib.impl(_op, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditnorm::{_op}", _fake, lib=_lib)


def _compiled_serves(x: Tensor) -> bool:
    """True once a process: when the Python body gets the first CUDA call and the compiled library could be put over it."""
    global unavailable, _warned
    if not x.is_cuda or _warned:
        return False
    with _lock:
        if unavailable is None and library is None:
            unavailable = _register(_PATH, "cuda")
        if unavailable is None:
            return True
        if not _warned:
            _warned = True
            warnings.warn(f"ditnorm: CUDA tensors take the slower PyTorch path: {unavailable}", RuntimeWarning, stacklevel=2)
    return False


def _register(file: Path, as_path: str) -> str | None:
    """Puts the compiled ops over the Python body; returns why that can't be done."""
    global library, path
    try:
        compiled = ctypes.CDLL(str(file))
    except OSError as error:
        return f"cannot load {file.name}: {error}"
    compiled.ditnorm_unusable.restype = ctypes.c_char_p
    reason: bytes | None = compiled.ditnorm_unusable()
    if reason is not None:
        return f"{file.name} does not run on this GPU and driver: {reason.decode()}"
    if compiled.ditnorm_register() != 0:
        return f"{file.name} could not register its operators"
    library, path = file, as_path
    return None


def _is_host_build(file: Path) -> bool:
    key = ctypes.CDLL(str(file)).ditnorm_dispatch_key
    key.restype = ctypes.c_char_p
    return bool(key() == b"CPU")


def _unavailable() -> str | None:
    if os.environ.get("DITNORM_KERNELS") == "0":
        return "DITNORM_KERNELS=0"
    if "DITNORM_LIBRARY" in os.environ and _is_host_build(_PATH):
        return _register(_PATH, "cpu_sim") or "DITNORM_LIBRARY names a build for the host"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not _PATH.exists():
        return "ditnorm was installed without compiled kernels (no CUDA compiler was found; see README, Installing)"
    return None


_PATH = Path(os.environ.get("DITNORM_LIBRARY", Path(__file__).with_name("_C.so")))
_warned = False
unavailable = _unavailable()
