"""What is fused in a model or pipeline, what isn't and why, on which path it runs and whether it
was verified.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import kernels
from ..fused.activation_sites import other_bits
from ..fused.laws import quantized_base
from ..fused.qk_sites import QKSite
from ..fused.quantized_linear import QuantizedLinear
from ..swapping.swapped import untouched
from . import patch, verification
from .restoring import tables
from .targets import listed, modules_of, number_of, targets
from .units import Unit
from .verification import Verification

_WIDTH = 100
_LABEL = 16


@dataclass(frozen=True)
class TransformerReport:
    """One transformer or controlnet, under the name of its component."""

    name: str
    class_name: str
    families: tuple[str, ...]
    blocks: int
    fused: int
    """Blocks that are fused now."""
    fusable: int
    """Blocks that patching fuses."""
    sites: int
    """Fused calls in one forward pass of the fusable or fused parts."""
    rounding: tuple[str, ...]
    """The laws of the fused parts; empty where nothing is patched."""
    backend: str
    verification: Verification
    refused: Mapping[str, list[str]]
    """Reason -> the parts that stay unfused for it."""
    changed: Mapping[str, list[str]]
    """What happened to fused parts since -> the parts. Whether they still run fused isn't known,
    and they can't be unpatched.
    """
    hooked: list[str]
    """Parts, such as norms, that run unfused because a hook watches them: one of their own, or one
    for all modules.
    """
    attentions: int
    """Attention modules of the fusable or fused blocks whose query and key are fused too."""
    unfused_attentions: Mapping[str, list[str]]
    """Reason -> the attention modules that stay upstream's for it."""
    products: Mapping[str, int] = field(default_factory=dict)
    """How activations are quantised -> the linear layers of the fusable or fused blocks that are
    fused so.
    """
    unfused_products: Mapping[str, list[str]] = field(default_factory=dict)
    """Reason -> the linear layers with quantised weights that their own library serves."""
    activations: Mapping[str, int] = field(default_factory=dict)
    """What patching makes of the activations between linear layers -> those of the fusable or fused
    blocks of which it does.
    """
    unfused_activations: Mapping[str, list[str]] = field(default_factory=dict)
    """Reason -> the activations that are PyTorch's as upstream calls them."""
    adapted_products: int = 0
    """How many of ``products`` are inside adapters, which read the activation itself, too."""
    rotated: int = 0
    """Attention modules whose fused call rotates, too."""
    left: Mapping[str, list[str]] = field(default_factory=dict)
    """What fused modules leave to upstream, and why -> the modules."""
    modulations: tuple[str, ...] = ()
    """What the tables of precomputed modulations hold, and what they were asked for."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Label and text of each row of the table."""
        yield self.name, f"{self.class_name} ({', '.join(self.families)})"
        of_blocks = f"of {number_of(self.blocks, 'block')}, {number_of(self.sites, 'fused call')} a forward pass"
        if self.rounding:
            yield "  fused", f"{self.fused} {of_blocks}"
            yield "  rounding", ", ".join(self.rounding)
        else:
            yield "  not patched", f"would fuse {self.fusable} {of_blocks}"
        yield "  backend", self.backend
        yield "  verified", str(self.verification)
        when = "" if self.rounding else "would be "
        for done, count in (("normed and rotated", self.rotated), ("normed", self.attentions - self.rotated)):
            if count:
                yield "  query and key", f"{when}{done} in one call in {number_of(count, 'attention module')}"
        for how, count in self.activations.items():
            yield "  activations", f"{how}: {count}"
        for law, count in self.products.items():
            yield "  quantised", f"{law}: {count} linear layers"
        if self.adapted_products:
            yield "  adapters", f"on {self.adapted_products} of these: the activation is written too, beside what it is quantised to"
        for reason, attentions in self.unfused_attentions.items():
            yield "  unfused", f"query and key of {listed(attentions)}: {reason}"
        for reason, modules in self.left.items():
            yield "  unfused", f"{reason}: {listed(modules)}"
        for reason, activations in self.unfused_activations.items():
            yield "  unfused", f"activations {listed(activations)}: {reason}"
        for reason, linears in self.unfused_products.items():
            yield "  unfused", f"quantised linear layers {listed(linears)}: {reason}"
        for text in self.modulations:
            yield "  modulations", text
        for reason, units in self.refused.items():
            yield "  refused", f"{listed(units)}: {reason}"
        for reason, units in self.changed.items():
            yield "  changed since", f"{listed(units)}: {reason}"
        if self.hooked:
            yield "  unfused", f"{listed(self.hooked)}: watched by a hook, which is shown upstream's own values"


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`report` found. It prints as a table, 100 columns wide, in a notebook and in a
    REPL too.
    """

    title: str
    transformers: tuple[TransformerReport, ...]
    calls: Counter[tuple[str, str]] | None
    """Calls in this process since the first of the transformers was patched: (op, path) -> n. None
    where none is patched.
    """

    def __str__(self) -> str:
        lines = [f"ditnorm: {self.title}"]
        for transformer in self.transformers:
            lines += ["", *(line for row in transformer.rows() for line in wrapped(*row))]
        if self.calls is not None:
            lines += ["", *_call_table(self.calls)]
        return "\n".join(lines)

    __repr__ = __str__


def report(target: object) -> Report:
    """What is fused in a diffusers pipeline or a model and what isn't, with the reasons.

    Verifies fused calls that weren't verified yet, unless the model is on a GPU and CUDA isn't
    initialised: it never initialises CUDA.

    Args:
        target: a pipeline or a model, patched or not.

    Returns:
        A report. It prints as a table; ``transformers`` has the same as data, ``calls`` how often
        each op ran in this process since patching, on which path.

    Raises:
        TypeError: for anything but a pipeline or a ``torch.nn.Module``.
        ValueError: if nothing in it is of a family that is known.

    Examples:
        >>> print(ditnorm.report(transformer))
        ditnorm: FluxTransformer2DModel
        ...
          not patched   would fuse 4 of 4 blocks, 23 fused calls a forward pass
        ...
    """
    found = targets(modules_of(target), target)
    transformers = tuple(_transformer(name, model, units) for name, (model, units) in found.items())
    patched = [model for model, units in found.values() if any(unit.fused for unit in units)]
    before = [patch.calls_before.get(model, Counter()) for model in patched]
    calls = verification.calls() - min(before, key=Counter.total) if before else None
    return Report(type(target).__name__, transformers, calls)


def _transformer(name: str, model: nn.Module, units: list[Unit]) -> TransformerReport:
    blocks = [unit for unit in units if unit.is_block]
    fused = [unit for unit in units if unit.fused]
    counted = fused or [unit for unit in units if unit.refusal is None]
    calls = [call for unit in counted for call in unit.calls(torch.float32)]  # their number doesn't depend on the dtype
    device, dtype = verification.execution_device(model), verification.stream_dtype(model)
    activations, unfused_activations = _activations(counted, device, dtype)
    roundings = tuple(sorted({unit.rounding for unit in fused if unit.rounding is not None}))
    return TransformerReport(
        name=name,
        class_name=type(model).__name__,
        families=tuple(dict.fromkeys(unit.body.family for unit in blocks)),
        blocks=len(blocks),
        fused=sum(unit.fused for unit in blocks),
        fusable=sum(unit.refusal is None for unit in blocks),
        sites=sum(call.quantised is None for call in calls),
        rounding=roundings,
        backend=_backend(device),
        verification=_verification(model, fused, roundings),
        refused=_by_reason(unit for unit in units if not unit.fused),
        changed=_by_reason(fused),
        hooked=[swap.name for unit in counted for swap in unit.swaps if swap.unfused_by_hooks and not untouched(swap.module)],
        attentions=sum(isinstance(call, QKSite) for call in calls),
        rotated=sum(isinstance(call, QKSite) and call.rotary is not None for call in calls),
        left=_left(counted),
        unfused_attentions=_unfused(counted, "query and key"),
        products=Counter(call.quantised for call in calls if call.quantised is not None),
        unfused_products=_unfused(counted, "matrix product"),
        activations=activations,
        unfused_activations=unfused_activations,
        adapted_products=sum(quantized_base(module) is not None for module in model.modules() if not isinstance(module, QuantizedLinear)),
        modulations=tuple(map(str, tables(model))),
    )


def _by_reason(units: Iterable[Unit]) -> dict[str, list[str]]:
    return _grouped((unit.name, unit.refusal) for unit in units if unit.refusal is not None)


def _unfused(units: Iterable[Unit], what: str) -> dict[str, list[str]]:
    return _grouped((part.name, part.reason) for unit in units for part in unit.unfused if part.what == what)


def _left(units: Iterable[Unit]) -> dict[str, list[str]]:
    parts = (part for unit in units for part in unit.unfused if part.what in unit.upstreams)
    return _grouped((part.name, f"{part.what}, as {part.reason}") for part in parts)


def _activations(units: list[Unit], device: torch.device, dtype: torch.dtype | None) -> tuple[Mapping[str, int], Mapping[str, list[str]]]:
    """How many are made what, and those that are PyTorch's by the reasons for it."""
    made: Counter[str] = Counter()
    left = [(part.reason, part.name) for unit in units for part in unit.unfused if part.what == "activation"]
    for activation in (activation for unit in units for activation in unit.activations()):
        reason = activation.reason
        if reason is None and activation.op is not None and dtype is not None:
            reason = other_bits(activation.op, device, dtype)
        if reason is None:
            made[activation.how] += 1
        else:
            left.append((reason, activation.path))
    return made, _grouped((name, reason) for reason, name in left)


def _grouped(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in named:
        found.setdefault(reason, []).append(name)
    return found


def _verification(model: nn.Module, fused: list[Unit], roundings: Iterable[str]) -> Verification:
    if not fused:
        return Verification(reason="nothing is patched")
    if "eager" not in roundings:
        return Verification(reason="rounding 'single' is more accurate than the unfused model, not equal to it")
    return verification.verify_units(model, [unit for unit in fused if unit.rounding == "eager"])


def _backend(device: torch.device) -> str:
    """Which path calls on ``device`` take. Looking must not initialise CUDA."""
    if device.type == "cpu":
        return f"cpu_sim: {kernels.library}" if kernels.path == "cpu_sim" else "reference (PyTorch): the model is on the CPU"
    if device.type != "cuda":
        return f"reference (PyTorch): the model is on {device.type}"
    if (reason := kernels.unavailable_on(device)) is not None:
        return f"reference (PyTorch): {reason}"
    if kernels.library is None:
        return "cuda: the kernels are loaded at the first call"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda, sm_{major}{minor}: {kernels.library}"


def wrapped(label: str, text: str) -> list[str]:
    """A row of a table as lines, at most 100 columns wide."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


_COMMON = ("norm_scale_shift", "scale_residual_norm_scale_shift", "scale_residual", "qk_norm_rope", "joint_qk_norm_rope")
"""The ops that are listed where they didn't run, too."""


def _call_table(calls: Counter[tuple[str, str]]) -> list[str]:
    paths = sorted({path for _, path in kernels.counts()})
    ops = [op for op in dict.fromkeys(op for op, _ in kernels.counts()) if op in _COMMON or any(calls[op, path] for path in paths)]
    lines = [f"{'calls in this process since patching':<40}" + "".join(f"{path:>12}" for path in paths)]
    lines += [f"  {op:<38}" + "".join(f"{calls[op, path]:>12}" for path in paths) for op in ops]
    return [*lines, "  (replays of CUDA graphs aren't counted)"]
