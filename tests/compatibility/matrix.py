"""The cells and what each of them checks."""

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.patched import forward_calls
from torch import Tensor, nn

from ditnorm.patching import patch_model, patch_pipeline, unpatch_model, unpatch_pipeline
from ditnorm.swapping import generated

from . import (
    attention,
    caches,
    compiled,
    copies,
    foreign,
    gpu,
    images,
    lora,
    modes,
    modular,
    offload,
    pipelines,
    quantised,
    quantised_with,
    training,
    user_hooks,
)
from .feature import DEVICE, ORDERS, Feature, Observe, Run, Upstream, modules_of

PATCHED_FIRST = ("patch before", "unpatch while active")
GROUPS: dict[str, tuple[Feature, ...]] = {
    "Hooks and offloading": offload.FEATURES,
    "Caches": caches.FEATURES,
    "Attention": (*attention.FEATURES, *images.FEATURES),
    "LoRA": lora.FEATURES,
    "Forward hooks and other modules": user_hooks.FEATURES,
    "Quantised weights": quantised.FEATURES,
    "Quantised weights with other features": quantised_with.FEATURES,
    "torch.compile and export": compiled.FEATURES,
    "Precision, modes and threads": modes.FEATURES,
    "Copies, saving and conversion": copies.FEATURES,
    "Training": training.FEATURES,
    "Pipelines": (*pipelines.FEATURES, *modular.FEATURES),
    "GPU only": gpu.FEATURES,
    "Other patchers": foreign.FEATURES,
}


@dataclass(frozen=True)
class Cell:
    group: str
    feature: Feature
    family: str
    order: str

    def __str__(self) -> str:
        return f"{self.feature.name.replace('`', '')}-{self.family}-{self.order}"


IN_ONE_ORDER = ("FLUX.1", "FLUX.2", "Z-Image", "Lumina2", "HunyuanVideo", "LTX-2", "SD3")
"""Families of which ``make test`` runs a feature in one of the orders, in turn: what an order does
is the same for all, and Qwen-Image and Wan have a feature in each.
"""
LONG_GRAPHS = ("FLUX.1", "Z-Image", "HunyuanVideo", "LTX-2")
"""Of these it leaves out what takes long to compile. It compiles their blocks, and whole models of
the same kinds (FLUX.2, Lumina2).
"""


def cells() -> Iterator[Cell]:
    for group, features in GROUPS.items():
        for feature in features:
            for family in feature.families:
                yield from (Cell(group, feature, family, order) for order in ORDERS)


def parameters() -> list[Any]:
    """The cells as pytest parameters with their marks."""
    return [pytest.param(cell, id=str(cell), marks=list(_marks(cell))) for cell in cells()]


def _marks(cell: Cell) -> Iterator[pytest.MarkDecorator]:
    feature = cell.feature
    out_of_turn = cell.family in IN_ONE_ORDER and cell.order != _order_in_turn(feature)
    if feature.in_turn:
        out_of_turn = (cell.family, cell.order) != (feature.families[_number(feature) % len(feature.families)], _order_in_turn(feature))
    if cell.order in feature.slow or out_of_turn or (feature.slow and cell.family in LONG_GRAPHS):
        yield pytest.mark.slow
    if feature.gpus:
        yield pytest.mark.gpu
        yield pytest.mark.skipif(torch.cuda.device_count() < feature.gpus, reason=f"needs {feature.gpus} GPU(s)")
    for module in feature.needs:
        yield pytest.mark.skipif(not _installed(module), reason=f"{module} is not installed")


def _order_in_turn(feature: Feature) -> str:
    """One of the orders that aren't slow."""
    orders = [order for order in ORDERS if order not in feature.slow] or list(ORDERS)
    return orders[_number(feature) % len(orders)]


def _number(feature: Feature) -> int:
    return [other for features in GROUPS.values() for other in features].index(feature)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def upstream_failure(cell: Cell) -> Upstream | None:
    """What upstream itself can't do in this cell, on this device."""
    failure = cell.feature.upstream.get(cell.family)
    return failure if failure is not None and failure.device in (None, DEVICE) else None


def check(cell: Cell, folder: Path) -> None:
    """Runs one cell: the unpatched model's bits with the feature in effect and the ops fused, and
    an exact way back.
    """
    feature, family = cell.feature, cell.family
    if upstream_failure(cell) is not None:
        _fails_as_upstream(cell, folder)
        return
    reference = _reference(feature, family)
    case = _Case(feature, family, feature.load(family), reference)

    if cell.order in PATCHED_FIRST:
        case.patch()
        case.apply(folder)
    else:
        case.apply(folder)
        case.patch(feature.refused)
    if cell.order == "re-patch":
        case.unpatch()
        case.patch(feature.refused)
    case.same_with_feature(reference.fused)

    if cell.order == "patch before" and feature.undo is not None:
        case.undo()
        case.same_without_feature(reference.plain_fused)
        case.unpatch()
        case.same_without_feature(0)
    elif cell.order in PATCHED_FIRST and feature.stuck is not None:
        with pytest.raises(RuntimeError, match=feature.stuck):
            case.unpatch()
        case.same_with_feature(reference.fused)
        case.undo()
        case.unpatch()
        case.same_without_feature(0)
    else:
        case.unpatch()
        case.same_with_feature(0)
        if feature.undo is not None:
            case.undo()
            case.same_without_feature(0)


@dataclass(frozen=True)
class _Reference:
    """The unpatched model without and with the feature; calls of the patched model without the
    feature and the range with it.
    """

    plain: Tensor
    output: Tensor
    observed: Any
    plain_fused: int
    fused: range | int


@functools.cache
def _plain(load: Callable[[str], Any], run: Run, observe: Observe, family: str, compares: bool) -> tuple[Tensor, Any, int]:
    """What a model without any feature makes, what is observed then, and the fused calls when it is
    patched: the same for many features. ``compares``: the first run of a process compares kernels
    with PyTorch's operations, and calls them for it.
    """
    target = load(family)
    plain, observed = observe(target, lambda: run(target, family))
    patch(target)
    if compares:
        run(target, family)
    fused, _ = fused_calls(lambda: run(target, family))
    return plain, observed, fused


@functools.lru_cache(maxsize=2)
def _reference(feature: Feature, family: str) -> _Reference:
    compares = feature.law is not None or DEVICE == "cuda"
    plain, plainly_observed, fused = _plain(feature.load, feature.run, feature.observe, family, compares)
    target = feature.load(family)
    with tempfile.TemporaryDirectory() as folder:
        with_feature = feature.apply(target, Path(folder))
        output, observed = feature.observe(with_feature, lambda: (feature.run_with or feature.run)(with_feature, family))
    assert fused > 0
    assert output.isfinite().all()
    assert observed != plainly_observed, "the feature has no effect on the unpatched model"
    wanted: dict[str, range | int] = {"all": fused * feature.passes, "some": range(1, fused), "any": range(1, sys.maxsize), "none": 0}
    return _Reference(plain, output, observed, fused, wanted[feature.fused_in.get(family, feature.fused)])


@dataclass
class _Case:
    feature: Feature
    family: str
    target: Any
    reference: _Reference

    def patch(self, warning: str | None = None) -> None:
        patch(self.target, warning)
        assert is_patched(self.target) or self.feature.fused == "none"

    def unpatch(self) -> None:
        unpatch(self.target)
        assert not is_patched(self.target)

    def apply(self, folder: Path) -> None:
        self.target = self.feature.apply(self.target, folder)

    def undo(self) -> None:
        assert self.feature.undo is not None
        self.target = self.feature.undo(self.target)

    def run_with(self) -> Tensor:
        return (self.feature.run_with or self.feature.run)(self.target, self.family)

    def same_with_feature(self, fused: int | range) -> None:
        calls, (output, observed) = fused_calls(lambda: self.feature.observe(self.target, self.run_with))
        if self.feature.compiles:
            calls, output = fused_calls(self.run_with)  # tracing runs the ops too, and is over now
        self._same(output, self.reference.output)
        assert self.feature.agrees(observed, self.reference.observed)
        assert calls in (fused if isinstance(fused, range) else (fused,))
        if self.feature.law is not None and fused != 0:
            assert quantised.unfused(modules_of(self.target), self.feature.law) == []

    def same_without_feature(self, fused: int) -> None:
        calls, output = fused_calls(lambda: self.feature.run(self.target, self.family))
        self._same(output, self.reference.plain)
        assert calls == fused

    def _same(self, output: Tensor, expected: Tensor) -> None:
        if self.feature.bound is None:
            assert torch.equal(output, expected)
        else:
            self.feature.bound(output, expected, self.family)


def _fails_as_upstream(cell: Cell, folder: Path) -> None:
    """Upstream's own failure, on the unpatched and on the patched model."""
    feature, expected = cell.feature, cell.feature.upstream[cell.family].error

    def use(target: Any, patched: bool) -> None:
        if patched and cell.order in PATCHED_FIRST:
            patch(target)
        target = feature.apply(target, folder)
        if patched and cell.order not in PATCHED_FIRST:
            patch(target)
        (feature.run_with or feature.run)(target, cell.family)

    for patched in (False, True):
        with pytest.raises(Exception, match=expected):
            use(feature.load(cell.family), patched)


def patch(target: Any, warning: str | None = None) -> None:
    """Patches all of ``target``, or warns as expected of what it leaves alone."""
    function: Any = patch_model if isinstance(target, nn.Module) else patch_pipeline
    if warning is None:
        function(target, strict=True)
    else:
        with pytest.warns(UserWarning, match=warning):
            function(target)


def unpatch(target: Any) -> None:
    (unpatch_model if isinstance(target, nn.Module) else unpatch_pipeline)(target)


def is_patched(target: Any) -> bool:
    return any(generated.origin_of(type(m)) for m in modules_of(target).modules())


def fused_calls(run: Callable[[], Any]) -> tuple[int, Any]:
    before = forward_calls()
    result = run()
    return forward_calls() - before, result
