"""The ops as PyTorch operators (``torch.ops.ditnorm``): schemas, fakes, the Python body, and which
calls the compiled library takes over.

One Python body serves every device; ``_C.so`` takes CUDA over at the first CUDA call. Not earlier:
asking the driver for its version at import would break CUDA in forked children.
"""

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.autograd import kernel_of
from ..ops.checks import UnfusedError, index_range
from ..ops.gradients import GRADIENTS
from ..ops.table import OPS as _TABLE
from ..ops.table import Op
from . import compiled

OPS = tuple(_TABLE)
ops = torch.ops.ditnorm

unavailable: str | None = None
"""Why the compiled kernels can't serve CUDA tensors, or None. Known for certain after the first
CUDA call.
"""

library: Path | None = None
"""The compiled library, once loaded."""

path = "cuda"
"""What the compiled library's calls are counted as: ``"cuda"``, or ``"cpu_sim"`` for a build of the
kernels for the host.
"""

_lock = threading.Lock()
_reference_calls = dict.fromkeys(OPS, 0)


def counts() -> dict[tuple[str, str], int]:
    """Calls of each op in this process: ``(op, "reference" or kernels.path) -> n``. Replays of CUDA
    graphs aren't counted.
    """
    loaded = None if library is None else compiled.opened(library)
    calls = {(op, path): 0 if loaded is None else loaded.ditnorm_calls(op.encode()) for op in OPS}
    return calls | {(op, "reference"): n for op, n in _reference_calls.items()}


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
        return run_reference(op, _checked(op, arguments))

    return body


def _elsewhere(op: Op) -> Callable[..., Any]:
    """The op's overload "reference", which the compiled library calls where its kernels don't run
    on the tensors' GPU.
    """

    def body(*arguments: Any) -> Any:
        device = arguments[0].device.index
        if library is not None and device is not None and device not in _refused:
            _refuse(device, f"{library.name} {compiled.unusable(library, device)}")
        return run_reference(op, _checked(op, arguments))

    return body


def _under_grad(op: Op) -> Callable[..., Any]:
    """The op's overload "under_grad", by which a compiler meets a call whose rows want gradients:
    it traces the op and the one that makes these, or the reference.
    """

    def body(*arguments: Any) -> Any:
        tensors, codes = arguments[: op.tensors], arguments[op.tensors :]
        fused = GRADIENTS[op.name].call(kernel_of(op.name), tensors, codes) if serves(arguments[0]) else None
        return op.reference(_checked(op, arguments)) if fused is None else fused

    return body


def _fake(op: Op) -> Callable[..., Any]:
    # Checks too: a call with one meta tensor among real ones is dispatched to the fake and must not
    # return uninitialised memory.
    return lambda *arguments: op.like(_checked(op, arguments))


def run_reference(op: Op, call: Any) -> Any:
    """The results of a call that PyTorch's operations serve, counted as such."""
    index_range(call)
    if not torch.compiler.is_compiling():  # Dynamo would guard a graph that counts by the count
        count_reference(op.name)
    return op.reference(call)


_lib = torch.library.Library("ditnorm", "DEF")
for _op in _TABLE.values():
    _lib.define(_op.schema)
    _lib.impl(_op.name, _body(_op), "CompositeExplicitAutograd")
    _lib.define(_op.schema.replace("(", ".reference(", 1))
    _lib.impl(f"{_op.name}.reference", _elsewhere(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditnorm::{_op.name}", _fake(_op), lib=_lib)
for _op in (_TABLE[_name] for _name in GRADIENTS):
    _lib.define(_op.schema.replace("(", ".under_grad(", 1))
    _lib.impl(f"{_op.name}.under_grad", _body(_op), "CompositeExplicitAutograd")
    _lib.impl(f"{_op.name}.under_grad", _under_grad(_op), "Autograd")


def _compiled_serves(x: Tensor) -> bool:
    """True once a process: when the Python body gets the first CUDA call and the compiled library
    could be put over it.
    """
    global unavailable
    device = x.device
    if device.type != "cuda" or device.index in _refused:
        return False
    with _lock:
        # Another GPU's refusal says nothing of this one.
        if library is None and (unavailable is None or unavailable in _refused.values()):
            unavailable = _register(FILE, "cuda", device.index)
        if unavailable is None:
            return True
        _refuse(device.index, unavailable)
    return False


def serves(x: Any) -> bool:
    """Whether the compiled kernels run where a tensor is: known for certain, since this puts them
    in place.
    """
    if library is None or path == "cuda":
        return _compiled_serves(x) if library is None else x.is_cuda and not (_refused and x.device.index in _refused)
    return bool(x.device.type == "cpu")


def may_serve(x: Any) -> bool:
    """:func:`serves` for a compiler, which mustn't load the library: whether kernels may come to
    run.
    """
    return bool(x.is_cuda or path == "cpu_sim")


def unavailable_on(gpu: torch.device) -> str | None:
    """Why calls on a GPU take the PyTorch path, or None. Known for certain after its first call."""
    if unavailable in _refused.values():  # what another GPU's first call found
        return _refused.get(gpu.index)
    return unavailable or _refused.get(gpu.index)


def _refuse(device: int, reason: str) -> None:
    """Notes why a GPU's calls go through PyTorch, with one warning for each reason."""
    known = reason in _refused.values()
    _refused[device] = reason
    if not known:
        warnings.warn(f"ditnorm: CUDA tensors take the slower PyTorch path: {reason}", RuntimeWarning, stacklevel=3)


def _register(file: Path, as_path: str, device: int) -> str | None:
    """Puts the compiled ops over the Python body; returns why that can't be done."""
    global library, path
    if (problem := compiled.problem(file)) is not None:
        return problem
    reason = compiled.unusable(file, device)
    if reason is not None:
        return f"{file.name} {reason}"
    if compiled.opened(file).ditnorm_register() != 0:
        return f"{file.name} could not register its operators"
    library, path = file, as_path
    return None


def _unavailable() -> str | None:
    if os.environ.get("DITNORM_KERNELS") == "0":
        return "DITNORM_KERNELS=0"
    if os.environ.get("DITNORM_LIBRARY"):
        if (problem := compiled.problem(FILE)) is not None:
            return problem
        if compiled.is_host_build(FILE):
            return _register(FILE, "cpu_sim", -1) or "DITNORM_LIBRARY names a build for the host"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not FILE.exists():
        why = _NOT_BUILT.read_text().strip() if _NOT_BUILT.exists() else "see README, Installing"
        return f"ditnorm was installed without compiled kernels ({why})"
    return None


FILE = Path(os.environ.get("DITNORM_LIBRARY") or Path(__file__).with_name("_C.so"))  # an empty one names none
"""Where the compiled library is looked for."""
_NOT_BUILT = Path(__file__).with_name("_not_built.txt")  # scripts/hatch_build.py leaves it in place of the library
_refused: dict[int, str] = {}
unavailable = _unavailable()
