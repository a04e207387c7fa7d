"""Prints, as JSON, the functions of the installed diffusers that ditnorm replaces in the tiny
models, with their fingerprints.
"""

import json
from collections.abc import Iterator

import torch
from support import tiny

from ditnorm.patching.units import find_units
from ditnorm.swapping.fingerprint import fingerprint


def found() -> dict[str, str]:
    """``module.Class.function`` without ``diffusers.models`` -> fingerprint."""
    models = (tiny.load(name, torch.float32) for name in tiny.MODELS)
    functions = {(cls, name) for model in models for cls, name in _replaced(model) if cls.__module__.startswith("diffusers.")}
    digests = {f"{cls.__module__}.{cls.__qualname__}.{name}": fingerprint(getattr(cls, name)) or "unreadable" for cls, name in functions}
    return {path.removeprefix("diffusers.models."): digest for path, digest in sorted(digests.items())}


def _replaced(model: torch.nn.Module) -> Iterator[tuple[type, str]]:
    for unit in find_units(model):
        for swap in unit.swaps:
            # Norms have no fingerprints of their own: swapping/norm_kinds.py knows the forward of
            # each kind.
            yield from ((swap.upstream, name) for name in getattr(swap.body, "fingerprints", None) or ("forward",))
            if hasattr(swap.module, "processor"):
                yield type(swap.module.processor), "__call__"


if __name__ == "__main__":
    print(json.dumps(found(), indent=1))
