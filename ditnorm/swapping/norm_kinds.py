"""Which norm a module is, by what its class runs. A norm of the right name that runs something else
is none that anybody here knows.
"""

from typing import Any

from torch import nn

from .fingerprint import fingerprint
from .originals import full_name, function_of, replaced, replaced_functional

_OF_TORCH: dict[type, str] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms", nn.Identity: "identity"}
_FP32_LAYER_NORM = frozenset({"918561380066"})  # FP32LayerNorm.forward of diffusers 0.37.0 to 0.42.1
_DIFFUSERS_RMS_NORM = frozenset({"fd0f231860cf", "ad030096bd29"})  # RMSNorm.forward of diffusers 0.37.0 to 0.40.0, and to 0.42.1


def norm_kind(cls: type) -> str | None:
    """``"layer"``, ``"rms"`` and ``"identity"``: torch's; ``"fp32_layer"`` and ``"diffusers_rms"``:
    diffusers'. None: not known.

    ``cls`` is the class itself: a subclass computes what it likes.
    """
    return _look(cls)[0]


def unknown_norm(cls: type) -> str:
    """Why ``cls`` has no :func:`norm_kind`, as the end of a sentence about it."""
    reason = _look(cls)[1]
    assert reason is not None
    return reason


def _look(cls: type) -> tuple[str | None, str | None]:
    name = full_name(cls)
    if cls.__call__ is not nn.Module.__call__:
        return None, f"{name}.__call__ was replaced"
    if cls in _OF_TORCH:
        function = function_of(cls)
        reason = replaced(cls, "forward") or (None if function is None else replaced_functional(function))
        return (_OF_TORCH[cls], None) if reason is None else (None, reason)
    forward: Any = vars(cls).get("forward")
    digest = fingerprint(forward)
    if issubclass(cls, nn.LayerNorm) and digest in _FP32_LAYER_NORM and forward.__globals__.get("F") is nn.functional:
        reason = replaced_functional("layer_norm")
        return ("fp32_layer", None) if reason is None else (None, reason)
    if digest in _DIFFUSERS_RMS_NORM:
        return "diffusers_rms", None
    if cls.__module__ == "diffusers.models.normalization" and cls.__name__ in ("FP32LayerNorm", "RMSNorm"):
        return None, f"this version of {cls.__name__} is unknown"
    return None, f"no fused layer stands in for {name}"
