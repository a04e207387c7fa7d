"""Hatchling hook that compiles ditnorm/kernels/_C.so where it can. DITNORM_CUDA: auto (default), 0
(never), 1 (failing to is an error).
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_kernels

LIBRARY = "ditnorm/kernels/_C.so"
NOT_BUILT = "ditnorm/kernels/_not_built.txt"


def cuda_mode() -> str:
    mode = os.environ.get("DITNORM_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"DITNORM_CUDA must be auto, 0 or 1, not {mode!r}")
    return mode


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the compiled library to wheels and editable installs; without it the wheel is pure
    Python, and a file in the library's place says why, for users to be told at run time: pip hides
    what a build prints.
    """

    def dependencies(self) -> list[str]:
        """For the time of the build: the nvcc of PyPI, when there is use for it and the machine has
        none, and the linker for an older glibc, when one is asked for.
        """
        mode = cuda_mode()
        wanted = mode == "1" or (mode == "auto" and build_kernels.why_not() is None)
        nvcc = [build_kernels.PYPI_NVCC] if wanted and build_kernels.find_nvcc() is None else []
        return nvcc + ([build_kernels.PYPI_LINKER] if wanted and build_kernels.oldest_glibc() is not None else [])

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, unless DITNORM_CUDA or the machine says no; raises when DITNORM_CUDA=1 and it
        can't, or when a compiler fails.
        """
        editable = version == "editable"
        # An editable install imports from the source tree, so the library has to lie there; a
        # wheel's build leaves the tree clean.
        self.scratch = tempfile.TemporaryDirectory()
        folder = Path(self.root if editable else self.scratch.name)
        out, not_built = folder / LIBRARY, folder / NOT_BUILT
        out.unlink(missing_ok=True)
        not_built.unlink(missing_ok=True)
        mode = cuda_mode()
        reason = "DITNORM_CUDA=0" if mode == "0" else build_kernels.why_not()
        if reason is None:
            build_kernels.build_cuda(out, build_kernels.target_archs())
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
        elif mode == "1":
            raise RuntimeError(f"DITNORM_CUDA=1, but the CUDA kernels can't be built: {reason}")
        else:
            self.app.display_warning(f"ditnorm: CUDA kernels not built ({reason}); installing the PyTorch path alone")
            not_built.parent.mkdir(parents=True, exist_ok=True)
            not_built.write_text(f"{reason}\n")
        if not editable:
            name = LIBRARY if reason is None else NOT_BUILT
            build_data["force_include"][str(folder / name)] = name
