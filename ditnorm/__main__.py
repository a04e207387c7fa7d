"""``python -m ditnorm``: what is installed, whether the kernels can be used here, and what is fused
in the installed diffusers, to read and to paste into a report of a bug.

The exit status is 0 where the kernels serve a GPU, and 1 where they don't; the first lines say why,
and what to do about it.
"""

import argparse
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch

from . import __version__, kernels
from .functional import norm_scale_shift
from .kernels import compiled
from .patching.coverage import coverage
from .patching.report import wrapped

_BESIDE = ("transformers", "accelerate", "peft")
_QUANTISATION = ("torchao", "gguf", "optimum-quanto", "bitsandbytes")
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "DITNORM_KERNELS", "DITNORM_LIBRARY")

Row = tuple[str, str]
"""A label and its text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows; returns the exit status."""
    argparse.ArgumentParser(prog="python -m ditnorm", description=(__doc__ or "").replace("``", "")).parse_args(argv)
    gpus = {index: _refusal(index) for index in range(_gpu_count())}
    usable = None in gpus.values()
    _print([("ditnorm", f"{__version__}; Python {platform.python_version()}, {platform.platform()}"), *_kernels(gpus)])
    _print([("torch", _torch()), ("diffusers", _version("diffusers")), ("beside it", _versions(_BESIDE))])
    _print([("quantisation", _versions(_QUANTISATION)), *_variables()])
    _print(_fused())
    return 0 if usable else 1


def _print(rows: list[Row]) -> None:
    home = os.path.expanduser("~")  # "~" where nobody knows, as of a user without a name
    for label, text in rows:
        shown = text.replace(home, "~") if len(home) > 1 else text
        print("\n".join(wrapped(label, shown)), flush=True)


def _kernels(gpus: dict[int, str | None]) -> Iterator[Row]:
    served = [f"GPU {index}" for index, refusal in gpus.items() if refusal is None]
    if served:
        yield "kernels", f"usable on {', '.join(served)}"
    else:
        reason = kernels.unavailable or next(iter(gpus.values()), None) or "PyTorch sees no GPU"
        yield "kernels", f"not usable: {reason}; {_remedy(reason)}. Without them ditnorm computes the same with PyTorch's operations."
    yield "library", _library()
    for index, refusal in gpus.items():
        found = torch.cuda.get_device_properties(index)
        capability = f"compute capability {found.major}.{found.minor}"
        path = "served" if refusal is None else f"PyTorch's operations, because {refusal}"
        yield f"GPU {index}", f"{found.name}, {capability}, {found.total_memory / 2**30:.0f} GiB: {path}"
    yield "driver", _driver()


def _gpu_count() -> int:
    """How many GPUs PyTorch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _refusal(index: int) -> str | None:
    """Runs an op on a GPU. Why the kernels didn't serve it, or None."""
    device = torch.device("cuda", index)
    try:
        norm_scale_shift(torch.ones(2, 64, device=device))
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # a GPU without free memory, or one that fell off the bus
        return _first_line(error)
    return kernels.unavailable_on(device)


def _remedy(reason: str) -> str:
    if sys.platform != "linux":
        return "they are made for Linux"
    if reason == "DITNORM_KERNELS=0" or os.environ.get("DITNORM_LIBRARY"):
        return f"unset {'DITNORM_KERNELS' if reason == 'DITNORM_KERNELS=0' else 'DITNORM_LIBRARY'}"
    if torch.version.cuda is None:
        return "where there is an NVIDIA GPU, install a CUDA build of PyTorch"
    if not kernels.FILE.exists():
        return "install it again with DITNORM_CUDA=1 set, which brings a compiler"
    if not torch.cuda.is_available():
        return "nvidia-smi should list an NVIDIA GPU and its driver, R580 or newer"
    if kernels.unavailable is None:
        return "see with nvidia-smi what else runs on the GPU"
    return "with the driver R580 or newer and a GPU of compute capability 8.0 or newer, install ditnorm again with DITNORM_CUDA=1 set"


def _library() -> str:
    file = kernels.FILE
    if not file.exists():
        return "none"
    if (problem := compiled.problem(file)) is not None:
        return problem
    archs = compiled.architectures(file)
    code = f"{', '.join(f'sm_{arch}' for arch in archs)} and PTX of compute_{archs[0]}" if archs else "a build for the host"
    return f"{file.name}, {file.stat().st_size / 1e6:.1f} MB: {code}"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi finds none"
    rows = [line.split(", ") for line in listed]
    return "; ".join(f"{driver} ({', '.join(of_gpu)})" for driver, *of_gpu in rows) or "nvidia-smi lists no GPU"


def _torch() -> str:
    built = torch.version.cuda or torch.version.hip
    return (
        f"{torch.__version__}, built for {'CUDA' if torch.version.cuda else 'ROCm'} {built}"
        if built
        else f"{torch.__version__}, without CUDA"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions(packages: tuple[str, ...]) -> str:
    return ", ".join(f"{package} {_version(package)}" for package in packages)


def _variables() -> list[Row]:
    found = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return [("environment", ", ".join(found))] if found else []


def _fused() -> list[Row]:
    try:
        found = coverage()
    except Exception as error:
        return [("fused", f"not known: diffusers can't be imported: {_first_line(error)}")]
    rows = [("", ""), ("fused", f"in diffusers {_version('diffusers')}, by patch_pipeline")]
    rows += [(f"  {family}", ", ".join(models)) for family, models in found.fused.items()]
    rows += [("  not known", f"{part}; it runs as without ditnorm") for part in found.unknown]
    return [*rows, ("  unfused", f"{len(found.others)} other transformers and ControlNets, which patching refuses by name")]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # what other libraries say as they are imported is no part of the text
    warnings.simplefilter("ignore")
    try:
        status = main()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
