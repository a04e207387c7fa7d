"""Attention modules whose QK norm, rotary embedding and joining of streams are one op: what their fused bodies share.

A body stands in for the attention *module*; which processor the module has is looked at in each call, so that processors that users set,
before or after patching, are respected: one that isn't known runs as upstream runs it.
"""

import importlib
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..layers import _DEFAULT_EPS
from ..ops.quantization import Law
from ..swapping.fingerprint import fingerprint
from ..swapping.generated import origin_of
from ..swapping.norm_kinds import norm_kind, unknown_norm
from .module import FusedModule, Part, upstream_of
from .norms import dtype_of
from .qk_sites import QKSite
from .quantized_linear import QuantizedLinear, hooked, law_for
from .sites import FusedCall


class QKNorm(FusedModule):
    """The norm of query or key. Called without a tensor it returns a copy of its weight.

    Hooks of offloading and layerwise casting put the right weight in place for the time of the call only. After it they swap it out, and
    a transfer on another stream may overwrite its memory before an op has read it.
    """

    unfused_by_hooks = True

    weight: nn.Parameter | None
    _forward_hooks: dict[int, Any]
    _forward_pre_hooks: dict[int, Any]

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Which norm it has to be, its attention says."""
        return norm_kind(upstream) in ("rms", "diffusers_rms")

    def forward(self, x: Tensor | None = None) -> Tensor | None:
        if x is not None:
            return super().forward(x)  # type: ignore[misc]
        return None if self.weight is None else self.weight.clone()


def weight_of(norm: Any) -> Tensor | None:
    """The weight of a :class:`QKNorm`: through a call where a hook wraps its forward."""
    weight: Tensor | None = norm() if "forward" in norm.__dict__ else norm.weight
    return weight


class FusedAttention(FusedModule):
    """A ``forward`` that computes what upstream's attention module does with one of the ``processors``."""

    processors: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Class of a processor, ``"module:name"`` or a name in the module of the attention class -> fingerprint of its ``__call__`` -> how it
    builds its mask, a method of the body (None: it takes what it is given)."""
    helpers: ClassVar[Mapping[str, frozenset[str]]]
    """Functions that the processors call and the body doesn't -> their accepted fingerprints. ``"module:name"`` for one that a processor
    imports in its call, else a name in the processor's module."""
    norm: ClassVar[str]
    """As of :func:`ditnorm.functional.qk_norm_rope`: of torch's class, or of diffusers'."""
    rotary: ClassVar[str]
    """The kind of its tables: ``"complex"``, ``"per_pair"`` or ``"per_element"``."""
    optional = True
    reported_as = "query and key"

    known: ClassVar[Mapping[type, Any]]
    """The processors that this process has, with their form; set on the generated class."""

    processor: Any
    _modules: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        origin = origin_of(cls)
        if origin is not None:
            cls.known = cls.known_processors(origin)

    @classmethod
    def known_processors(cls, origin: type) -> dict[type, Any]:
        """The processor classes with an accepted fingerprint -> their form."""
        known: dict[type, Any] = {}
        for path, forms in cls.processors.items():
            module, _, name = path.rpartition(":")
            try:
                processor = getattr(importlib.import_module(module or origin.__module__), name, None)
            except ImportError:  # a release without this model
                continue
            if not isinstance(processor, type):
                continue
            call = vars(processor).get("__call__")
            digest = fingerprint(call) or ""
            if digest in forms and cls._unknown_helper(call) is None:
                known[processor] = forms[digest]
        return known

    @classmethod
    def _unknown_helper(cls, call: Any) -> str | None:
        for path, accepted in cls.helpers.items():
            module, _, name = path.rpartition(":")
            function = getattr(importlib.import_module(module), name) if module else call.__globals__.get(name)
            if function is not None and fingerprint(function) not in accepted:
                return name
        return None

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        origin = upstream_of(type(module))
        processor = type(getattr(module, "processor", None))
        if processor not in cls.known_processors(origin):
            name, call = f"{processor.__module__}.{processor.__qualname__}", vars(processor).get("__call__")
            helper = cls._unknown_helper(call) if isinstance(call, FunctionType) else None
            return f"its processor {name} " + ("is not one that ditnorm knows" if helper is None else f"calls an unknown {helper}")
        norms = {name: getattr(module, name, None) for name in cls.norms(module)}
        for name, norm in norms.items():
            reason = cls._norm_unsupported(norm)
            if reason is not None:
                return f"{name}: {reason}"
        if len({norm.eps for norm in norms.values()}) > 1:  # type: ignore[union-attr]
            return "its norms have different eps"
        return None

    @classmethod
    def _norm_unsupported(cls, norm: Any) -> str | None:
        upstream = upstream_of(type(norm))
        kind = norm_kind(upstream)
        if kind is None:
            return unknown_norm(upstream)
        if kind != cls.norm:
            return f"{upstream.__module__}.{upstream.__qualname__} is not the norm that ditnorm knows here"
        return "it has a bias" if getattr(norm, "bias", None) is not None else None

    @classmethod
    def parts(cls, module: nn.Module) -> Iterator[Part]:
        """The norms."""
        return (Part(name, module.get_submodule(name), QKNorm) for name in cls.norms(module))

    @classmethod
    def calls(cls, module: Any, dtype: torch.dtype) -> Iterator[FusedCall]:
        """One, on a stream of ``dtype``."""
        norm, heads = module.norm_q, module.heads
        eps = _DEFAULT_EPS if norm.eps is None else norm.eps
        joint, across = "norm_added_q" in cls.norms(module), cls.norm == "rms"
        yield QKSite(joint, heads, module.inner_dim // heads, across, dtype, cls.norm, eps, dtype_of(norm.weight), cls.rotary)

    @classmethod
    def norms(cls, module: Any) -> tuple[str, ...]:
        """The norms that the fused call stands in for."""
        if getattr(module, "add_q_proj", None) is None:
            return ("norm_q", "norm_k")
        return ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

    def fuses(self) -> bool:
        """Whether a call takes the fused path: a known processor, our norms, and none that a user's hook looks at."""
        if type(self.processor) not in self.known:
            return False
        modules = self._modules
        for name in self.norms(self):
            norm = modules.get(name)
            if not isinstance(norm, QKNorm) or norm._forward_hooks or norm._forward_pre_hooks:
                return False
        return True

    def law(self, x: Tensor, *names: str) -> Law | None:
        """The law by which the projections ``names`` quantise what the module is given with the shape and dtype of ``x``.

        None where something wants it as it is. Then, and if its call wouldn't take the fused path, it must not come quantised.
        """
        modules = self._modules
        if not isinstance(modules.get(names[0]), QuantizedLinear) or "forward" in self.__dict__ or hooked(self) or not self.fuses():
            return None
        return law_for(x, *(modules[name] for name in names))

    def fits(self, op: str, condition: bool) -> bool:
        """``condition``, on which the fused call of ``op`` depends. Where it doesn't hold the call counts as one of PyTorch's path."""
        if not condition and not torch.compiler.is_compiling():  # a graph that changed the counter would be guarded by its value
            kernels.count_reference(op)
        return condition

    def eps(self) -> float:
        eps: float | None = self.norm_q.eps
        return _DEFAULT_EPS if eps is None else eps

    def upstream(self, name: str) -> Any:
        """A function of the processor's module, as the processor itself would call it."""
        return type(self.processor).__call__.__globals__[name]


def law_in(attention: Any, x: Tensor, *names: str) -> Law | None:
    """:meth:`FusedAttention.law` of an attention module that may be unfused."""
    return attention.law(x, *names) if isinstance(attention, FusedAttention) else None
