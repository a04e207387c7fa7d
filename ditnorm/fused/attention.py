"""Attention modules whose QK norm, rotary embedding and joining of streams are one op: what their
fused bodies share.

A body stands in for the attention *module*; which processor the module has is looked at in each
call, so that processors that users set, before or after patching, are respected: one that isn't
known runs as upstream runs it.
"""

import importlib
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..ops.options import RMS_EPS
from ..ops.quantization import Wanted
from ..swapping.fingerprint import fingerprint
from ..swapping.norm_kinds import norm_kind, unknown_norm
from ..swapping.originals import full_name
from ..swapping.swapped import untouched
from ..swapping.torch_private import asked_once, traced_as
from .laws import hooked, law_for, quantized_base
from .module import FusedModule, Part, upstream_of
from .norms import LendsWeight, dtype_of
from .qk_sites import QKSite
from .sites import FusedCall


class QKNorm(LendsWeight, FusedModule):
    """The norm of query or key."""

    fingerprints = {}
    unfused_by_hooks = True

    eps: float | None

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether it is an RMSNorm. The attention module says which kind it has to be."""
        return norm_kind(upstream) in ("rms", "diffusers_rms")


def _alike(norms: list[Any], kind: str, across: bool) -> bool:
    """Whether one op can stand for ``norms``, which are of ``kind``, as they are now."""
    eps = norms[0].eps if isinstance(norms[0], QKNorm) else None
    for norm in norms:
        if not isinstance(norm, QKNorm):
            return False
        state: dict[str, Any] = norm.__dict__
        parameters = state["_parameters"]
        if state["eps"] != eps:
            return False
        if across and parameters.get("weight") is None:  # its weight tells it from a norm for each head
            return False
        if kind != "rms" and (parameters.get("bias") is not None or state.get("bias") is not None):
            return False
    return True


class Processor(NamedTuple):
    """A class of processors, as it was when its fingerprint was found to be a known one."""

    call: Any
    """The ``__call__`` of the class."""
    form: Any
    """Its form, see :attr:`FusedAttention.processors`."""
    helpers: tuple[tuple[dict[str, Any], str, Any], ...]
    """The functions that it calls and the body doesn't, with the globals that hold them."""

    def still(self, cls: Any) -> bool:
        """Whether ``cls`` still runs what it ran then."""
        if cls.__call__ is not self.call:
            return False
        for namespace, name, function in self.helpers:  # noqa: SIM110 (a generator takes several times as long, in Dynamo too)
            if namespace.get(name) is not function:
                return False
        return True


class FusedAttention(FusedModule):
    """A ``forward`` that computes what upstream's attention module does with one of the
    ``processors``.
    """

    processors: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Class of a processor, ``"module:name"`` or a name in the module of the attention class ->
    fingerprint of its ``__call__`` -> its form: what the body has to know of it, such as how it
    builds its mask (None: nothing).
    """
    helpers: ClassVar[Mapping[str, frozenset[str]]]
    """Functions that the processors call and the body doesn't -> their accepted fingerprints.
    ``"module:name"`` for one that a processor imports in its call, else a name in the processor's
    module.
    """
    norm: ClassVar[str]
    """The ``norm`` of :func:`ditnorm.functional.qk_norm_rope`."""
    across: ClassVar[bool] = False
    """Whether one norm goes across all heads."""
    rotary: ClassVar[str | None]
    """The kind of its tables: ``"complex"``, ``"per_pair"``, ``"per_element"``, or for each head
    ``"halves"``, ``"per_element_of_head"``; None: it has none.
    """
    optional = True
    reported_as = "query and key"

    known: ClassVar[dict[type, Processor]]
    """The processors that this process has; set on the generated class."""

    processor: Any

    @classmethod
    def _look(cls) -> bool:
        cls.known = {} if torch.compiler.is_compiling() else cls.known_processors(cls.origin)
        return super()._look()

    @classmethod
    def known_processors(cls, origin: type) -> dict[type, Processor]:
        """The processor classes with an accepted fingerprint."""
        known: dict[type, Processor] = {}
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
                helpers = tuple((namespace, name, namespace.get(name)) for namespace, name, _ in cls._helpers(call))
                known[processor] = Processor(call, forms[digest], helpers)
        return known

    @classmethod
    def _helpers(cls, call: Any) -> Iterator[tuple[dict[str, Any], str, frozenset[str]]]:
        """The globals that hold a function that ``call`` calls, its name, and its accepted
        fingerprints.
        """
        for path, accepted in cls.helpers.items():
            module, _, name = path.rpartition(":")
            yield vars(importlib.import_module(module)) if module else call.__globals__, name, accepted

    @classmethod
    def _unknown_helper(cls, call: Any) -> str | None:
        for namespace, name, accepted in cls._helpers(call):
            function = namespace.get(name)
            if function is not None and fingerprint(function) not in accepted:
                return name
        return None

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        origin = upstream_of(type(module))
        processor = type(getattr(module, "processor", None))
        if processor not in cls.known_processors(origin):
            name, call = full_name(processor), vars(processor).get("__call__")
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
            return f"{full_name(upstream)} is not the norm that ditnorm knows here"
        return "it has a bias" if getattr(norm, "bias", None) is not None else None

    @classmethod
    def parts(cls, module: nn.Module) -> Iterator[Part]:
        """The norms."""
        return (Part(name, module.get_submodule(name), QKNorm) for name in cls.norms(module))

    @classmethod
    def calls(cls, module: Any, dtype: torch.dtype) -> Iterator[FusedCall]:
        """One, on a stream of ``dtype``."""
        norm, heads = module.norm_q, module.heads
        eps = RMS_EPS if norm.eps is None else norm.eps
        joint, head_dim = "norm_added_q" in cls.norms(module), module.inner_dim // heads
        yield QKSite(joint, heads, head_dim, cls.across, dtype, cls.norm, eps, dtype_of(norm.weight), cls.rotary)

    @classmethod
    def norms(cls, module: Any) -> tuple[str, ...]:
        """The norms that the fused call stands in for."""
        if module._modules.get("add_q_proj") is None:
            return ("norm_q", "norm_k")
        return ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

    @asked_once
    def fuses_now(self) -> bool:
        """Whether :meth:`fuses` finds a processor, as Dynamo asks it."""
        return self.fuses() is not None

    def traced_fuses(self) -> Processor | None:
        """:meth:`fuses`, as Dynamo traces it: it looks at what Dynamo would guard on in upstream's
        forward.
        """
        if not self.fuses_now():
            return None
        cls, eps = type(self.processor), self.norm_q.eps
        for name in self.norms(self):
            if self._modules[name].eps != eps:
                return None
        known = self.known[cls]
        return known if known.still(cls) else None

    @traced_as(traced_fuses)
    def fuses(self) -> Processor | None:
        """The processor, where a call takes the fused path: it is known, the norms are ours and
        alike, and nobody watches them.
        """
        if not self.intact():
            return None
        cls = type(self.processor)
        known = self.known.get(cls)
        if (known is None or not known.still(cls)) and (known := self._look_at(cls)) is None:
            return None
        modules, kind = self._modules, self.norm
        norms = [modules.get(name) for name in self.norms(self)]
        return known if _alike(norms, kind, self.across) and untouched(*norms) else None

    @classmethod
    def _look_at(cls, processor: type) -> Processor | None:
        """Looks at a processor class again: what it runs may have been replaced, or put back,
        since.
        """
        named = any(path.rpartition(":")[2] == processor.__name__ for path in cls.processors)
        if not named or torch.compiler.is_compiling():
            return None
        cls.known = cls.known_processors(cls.origin)
        return cls.known.get(processor)

    def laws(self, *streams: tuple[Tensor, tuple[str, ...]]) -> tuple[Wanted | None, ...]:
        """For each stream, given as a tensor of its shape and dtype with the names of its
        projections: the law by which all of these quantise it.

        None where something reads the stream as it is, or where the call wouldn't take the fused
        path. The module must not be given that stream quantised then.
        """
        modules = self._modules
        quantised = [quantized_base(modules.get(names[0])) for _, names in streams]
        if not any(quantised) or hooked(self) or not self.fuses():
            return (None,) * len(streams)
        return tuple([law_for(x, *[modules[name] for name in names]) for x, names in streams])

    def fits(self, op: str, condition: bool) -> bool:
        """``condition``, on which the fused call of ``op`` depends. Where it doesn't hold the call
        counts as one of PyTorch's path.
        """
        if not condition and not torch.compiler.is_compiling():  # Dynamo would guard a graph that counts by the count
            kernels.count_reference(op)
        return condition

    def project(self, x: Any) -> Tensor:
        """What ``to_out``, a linear layer and its dropout, makes of ``x``."""
        linear, dropout, *_ = self.to_out._modules.values()  # an index into a list of modules costs two microseconds
        projected: Tensor = dropout(linear(x))
        return projected

    def eps(self) -> float:
        eps: float | None = self.norm_q.eps
        return RMS_EPS if eps is None else eps

    def upstream(self, name: str) -> Any:
        """A function of the processor's module, as the processor itself would call it."""
        return type(self.processor).__call__.__globals__[name]


OWN, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
"""The projections of an attention module's own stream, and of the second one, the text."""


def _no_laws(attention: Any, *streams: Any) -> tuple[None, ...]:
    return (None,) * len(streams)


@traced_as(_no_laws)
def laws_in(attention: Any, *streams: tuple[Tensor, tuple[str, ...]]) -> tuple[Wanted | None, ...]:
    """:meth:`FusedAttention.laws` of an attention module that may be unfused."""
    return attention.laws(*streams) if isinstance(attention, FusedAttention) else (None,) * len(streams)


def law_in(attention: Any, x: Tensor, *names: str) -> Wanted | None:
    """:func:`laws_in` of one stream, with the names of its projections."""
    return laws_in(attention, (x, names))[0]
