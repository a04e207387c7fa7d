"""Where a run took place."""

import datetime
import platform
import subprocess
import sys
from typing import Any

import torch
from common.command import as_command

from .libraries import Found


def describe(peers: Found) -> dict[str, Any]:
    """Command, date, GPU, driver and versions; which peers are missing and why."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "command": as_command(sys.argv[0], sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "peers": peers.versions,
        "missing": peers.missing,
    }


def text(environment: dict[str, Any]) -> str:
    """The same for the terminal."""
    found = ", ".join(f"{name} {version}" for name, version in environment["peers"].items()) or "none"
    lines = [
        environment["command"],
        f"{environment['date']}; {environment['gpu']}, driver {environment['driver']}; torch {environment['torch']}, "
        f"CUDA {environment['cuda']}, Python {environment['python']}",
        f"peers: {found}",
    ]
    lines += [f"missing: {name} ({reason})" for name, reason in environment["missing"].items()]
    return "\n".join(lines)
