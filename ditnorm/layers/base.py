"""What all layers over a norm share: how one is made of the norm that it stands in for."""

from typing import Any, TypeVar

import torch
from torch import nn

from ..ops import expect
from ..ops.options import ROUNDINGS
from ..swapping.norm_kinds import norm_kind, unknown_norm
from ..swapping.originals import full_name
from ..swapping.swapped import Swapped

L = TypeVar("L", bound="NormLayer")

_NAMES = {"layer": "a LayerNorm", "rms": "an RMSNorm", "fp32_layer": "an FP32LayerNorm"}


class NormLayer(Swapped, nn.Module):
    """What the layers share beside ``weight`` and ``bias`` (Parameters or None)."""

    norm: str = "layer"
    rounding: str = "single"
    normalized_shape: tuple[int, ...]
    eps: Any  # float or None
    elementwise_affine: bool
    weight: Any  # nn.Parameter or None, as bias
    bias: Any

    @classmethod
    def from_norm(cls: type[L], module: nn.Module, rounding: str = "single") -> L:
        """A layer with the Parameters (the same objects), eps and mode of ``module``.

        Args:
            module: ``nn.LayerNorm``, ``nn.RMSNorm``, diffusers' ``FP32LayerNorm`` or, where it
                computes the same, diffusers' ``RMSNorm``: not with a half-precision weight, to
                which it rounds before it multiplies.
            rounding: ``"single"`` or ``"eager"``.

        Raises:
            TypeError: for anything else, subclasses included.
            ValueError: for a norm over more than one dim.
        """
        norm, shape = _kind(module)
        eps: Any = module.eps
        layer = cls._make(norm, shape, eps, rounding)
        for name in ("weight", "bias"):
            layer.register_parameter(name, getattr(module, name, None))
        layer.elementwise_affine = layer.weight is not None
        return layer.train(module.training)

    @classmethod
    def _make(cls: type[L], norm: str, shape: tuple[int, ...], eps: float | None, rounding: str) -> L:
        if norm.removeprefix("fp32_") != cls.norm:
            raise TypeError(f"{cls.__name__}.from_norm: expected {_NAMES[cls.norm]}, got {_NAMES[norm]}")
        layer: Any = cls(shape, eps, False, rounding=rounding)
        layer._set("norm", norm)
        return layer

    def _set(self, name: str, value: str) -> None:
        # The class carries the usual value: a patched module stores nothing on its instance.
        if value != getattr(self, name):
            setattr(self, name, value)

    def _configure(self, rounding: str) -> None:
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape: expected the last dim only, got {list(self.normalized_shape)}")
        expect.option("rounding", rounding, ROUNDINGS)
        self._set("rounding", rounding)

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether ``upstream`` is the norm that the layer computes."""
        return norm_kind(upstream) == cls.norm

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rounding={self.rounding!r}"


def parameter(layer: NormLayer, name: str) -> Any:
    """An attribute that a layer has among its Parameters, where they weren't moved elsewhere as by
    FSDP: PyTorch looks for it in half a microsecond.
    """
    parameters = layer._parameters
    return parameters[name] if name in parameters else getattr(layer, name)


def nothing_modulated(*modulation: Any, **named: Any) -> None:
    """Raises ``TypeError`` where a layer that was called without ``x`` has been given what only
    applies with it.
    """
    if any(t is not None for t in (*modulation, *named.values())):
        raise TypeError("x: missing; with a modulation the layer takes residual and x, and residual alone is normed as it is")


def _kind(module: Any) -> tuple[str, tuple[int, ...]]:
    """The norm of a layer that computes what ``module`` does, and its shape; ``TypeError`` where
    there is none.
    """
    kind = norm_kind(type(module))
    if kind == "diffusers_rms":
        if module.weight is not None and module.weight.dtype is not torch.float32:
            raise TypeError(
                f"from_norm: diffusers' RMSNorm with a {module.weight.dtype} weight rounds before it multiplies; no layer here does"
            )
        return "rms", tuple(module.dim)
    if kind in ("layer", "rms", "fp32_layer"):
        return kind, module.normalized_shape
    name, reason = full_name(type(module)), ""
    if not isinstance(module, nn.Module):
        name = "None" if module is None else name
    elif kind is None:
        reason = f" ({unknown_norm(type(module))})"
    raise TypeError(f"from_norm: expected nn.LayerNorm, nn.RMSNorm, or diffusers' FP32LayerNorm or RMSNorm, got {name}{reason}")
