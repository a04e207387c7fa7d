"""Hatchling's build backend, whose wheels say in their names which kernels are in them.

pip shows nothing of what a build prints, but the name of the wheel that it made. A wheel with the
kernels for all architectures has hatchling's name; another gets a build tag: ``0sm90`` with those
for compute capability 9.0 alone, ``0nokernels`` with none. Where pip has the choice, it takes the
whole wheel: its platform is a manylinux.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import hatchling.build

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_kernels

LIBRARY = "ditnorm/kernels/_C.so"


def build_wheel(wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None) -> str:
    """As of PEP 517."""
    return _tagged(Path(wheel_directory, hatchling.build.build_wheel(wheel_directory, config_settings, metadata_directory)))


def __getattr__(name: str) -> Any:
    """The other hooks are hatchling's; which of them it has depends on who asks."""
    return getattr(hatchling.build, name)


def _tagged(wheel: Path) -> str:
    """Renames the wheel where it isn't whole; returns its name."""
    with zipfile.ZipFile(wheel) as archive:
        compiled = LIBRARY in archive.namelist()
    archs = build_kernels.target_archs() if compiled else []
    if archs == list(build_kernels.ALL_ARCHS):
        return wheel.name
    project, version, tags = wheel.name.split("-", 2)
    build = "0" + ("_".join(f"sm{arch}" for arch in archs) if compiled else "nokernels")
    return wheel.replace(wheel.with_name(f"{project}-{version}-{build}-{tags}")).name
