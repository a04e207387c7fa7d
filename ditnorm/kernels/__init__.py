"""The ops as PyTorch operators (``torch.ops.ditnorm``): schemas, fakes, the Python body, and the compiled library over it.

One Python body serves every device; ``_C.so`` takes CUDA over at the first CUDA call. Not earlier: asking the driver for its
version at import would break CUDA in forked children.
"""

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import UnfusedError, index_range
from ..ops.table import OPS as _TABLE
from ..ops.table import Op

OPS = tuple(_TABLE)
ops = torch.ops.ditnorm

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


def count_reference(op: str) -> None:
    """Counts a call that PyTorch's operations serve."""
    _reference_calls[op] += 1


def _checked(op: Op, arguments: tuple[Any, ...]) -> Any:
    call = op.named(arguments)
    op.check(call)
    reason = op.unfused(call)
    if reason is not None:
        raise UnfusedError(reason)
    return call


def _body(op: Op) -> Callable[..., Any]:
    def body(*arguments: Any) -> Any:
        if _compiled_serves(arguments[0]):
            return getattr(ops, op.name).default(*arguments)
        return in_pytorch(op, _checked(op, arguments))

    return body


def _fake(op: Op) -> Callable[..., Any]:
    # Checks too: a call with one meta tensor among real ones is dispatched to the fake and must not return uninitialised memory.
    return lambda *arguments: op.like(_checked(op, arguments))


def in_pytorch(op: Op, call: Any) -> Any:
    """The results of a call that PyTorch's operations serve, counted as such."""
    index_range(call)
    if not torch.compiler.is_compiling():  # a graph that changed the counter would be guarded by its value
        count_reference(op.name)
    return op.reference(call)


_lib = torch.library.Library("ditnorm", "DEF")
for _op in _TABLE.values():
    _lib.define(_op.schema)
    _lib.impl(_op.name, _body(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditnorm::{_op.name}", _fake(_op), lib=_lib)


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
