"""The compiled library as a file: whether it is this version's, and what it runs on."""

import ctypes
import struct
from functools import cache
from pathlib import Path

from ..ops.options import HALVES, NORMS, PAIRS, QK_NORMS, ROUNDINGS
from ..ops.quantization import LAWS
from ..ops.table import OPS

_OTHER_VERSION = "is of another version of ditnorm: build it again"


def problem(file: Path) -> str | None:
    """Why a file is not this version's compiled library, or None."""
    try:
        reason = differs(opened(file))
    except OSError as error:
        return f"cannot load {file.name or file}: {error}"
    except AttributeError:
        reason = _OTHER_VERSION
    return None if reason is None else f"{file.name} {reason}"


@cache
def opened(file: Path) -> ctypes.CDLL:
    """The library, whose C functions can be called.

    Raises:
        OSError: where it can't be loaded.
        AttributeError: where it lacks one of the functions.
    """
    if _is_cut_short(file):
        raise OSError(f"{file} was written or copied only in part")
    library = ctypes.CDLL(str(file))
    library.ditnorm_dispatch_key.restype = library.ditnorm_unusable.restype = library.ditnorm_architectures.restype = ctypes.c_char_p
    library.ditnorm_calls.restype = library.ditnorm_code.restype = ctypes.c_int64
    return library


def _is_cut_short(file: Path) -> bool:
    """Whether an ELF file ends before its table of sections, which is the last thing in it. Loading
    one that does ends the process.
    """
    with file.open("rb") as opened:
        header = opened.read(64)
    if len(header) < 64:
        return True
    table, size, number = *struct.unpack_from("<Q", header, 40), *struct.unpack_from("<HH", header, 58)
    return header.startswith(b"\x7fELF") and file.stat().st_size < table + size * number


def differs(library: ctypes.CDLL) -> str | None:
    """Whether the library lacks an op, or stands for a name of an option by another number than
    Python.
    """
    halves = [str(half).removeprefix("torch.") for half in HALVES]
    options = {"norm": NORMS, "qk_norm": QK_NORMS, "pairs": PAIRS, "rounding": ROUNDINGS, "half": halves}
    options["law"] = [str(law) for law in LAWS]
    codes = [(option, name, code) for option, names in options.items() for code, name in enumerate(names)]
    has_ops = all(library.ditnorm_calls(op.encode()) >= 0 for op in OPS)
    if has_ops and all(library.ditnorm_code(option.encode(), name.encode()) == code for option, name, code in codes):
        return None
    return _OTHER_VERSION


def architectures(file: Path) -> list[str]:
    """The compute capabilities that the library has machine code for, lowest first: ["90"] for 9.0.
    Empty for a build for the host, and where no library can be loaded.
    """
    try:
        found: str = opened(file).ditnorm_architectures().decode()
    except (OSError, AttributeError):
        return []
    return found.split(",") if found else []


def unusable(file: Path, device: int) -> str | None:
    """Why the library's kernels don't run on a GPU, or None. Asks the driver."""
    reason: bytes | None = opened(file).ditnorm_unusable(device)
    return None if reason is None else f"does not run on this GPU and driver: {reason.decode()}"


def is_host_build(file: Path) -> bool:
    """Whether the library is a build of the kernels for the host."""
    return bool(opened(file).ditnorm_dispatch_key() == b"CPU")
