"""What the matrix is made of: a feature, how it is switched on and off, and what shows that it is
really in effect.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support import tiny
from support.model_checks import moved
from torch import Tensor, nn

from ditnorm.ops.quantization import Law

FAMILIES = {
    "Qwen-Image": "qwen-image",
    "FLUX.1": "flux",
    "FLUX.2": "flux2-klein",
    "Z-Image": "z-image-small",
    "Lumina2": "lumina2",
    "Wan": "wan-t2v",
    "HunyuanVideo": "hunyuan-video",
    "LTX-2": "ltx2",
    "SD3": "sd3.5-medium",
}
"""Family -> its model in ``tiny.MODELS``."""
DTYPE = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDERS = {
    "patch before": "patch, then the feature; the feature removed while patched; unpatch",
    "patch after": "the feature, then patch; unpatch",
    "unpatch while active": "patch, the feature, a run, unpatch; the feature removed after that",
    "re-patch": "the feature, patch, unpatch, patch; unpatch",
}

Run = Callable[[Any, str], Tensor]
Observe = Callable[[Any, Callable[[], Tensor]], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Upstream:
    """The feature fails on an unpatched model of this family (on ``device`` only, if given);
    ``error`` matches upstream's own message.
    """

    error: str
    why: str
    device: str | None = None


@dataclass(frozen=True, eq=False)
class Feature:
    """One row of the table.

    ``apply(target, folder)`` switches the feature on and returns what to run from then on;
    ``undo(target)`` switches it off. ``observe(target, run)`` runs once and returns the output with
    an observation, which must differ from that of a plain model and equal that of the unpatched
    model with the feature. ``run(target, family)`` is one run, by default one forward pass;
    ``run_with`` is the run while the feature is on, where the feature is a way of running.
    """

    name: str
    apply: Callable[[Any, Path], Any]
    observe: Observe
    undo: Callable[[Any], Any] | None = None
    run: Run = field(default=lambda model, family: forward(model, family))
    run_with: Run | None = None
    load: Callable[[str], Any] = field(default=lambda family: load(family))
    families: tuple[str, ...] = tuple(FAMILIES)
    fused: str = "all"
    """``"all"``: as many fused calls a pass as without the feature; ``"some"``: fewer, because the
    feature skips or takes away sites; ``"none"``; ``"any"``: more than none, where the feature
    calls the ops in another number.
    """
    fused_in: Mapping[str, str] = field(default_factory=dict)
    """The same of families that differ."""
    passes: int = 1
    """Forward passes of ``run_with`` for each of ``run``."""
    bound: Callable[[Tensor, Tensor, str], None] | None = None
    """Compares output and expected output where bit-identity isn't promised."""
    upstream: Mapping[str, Upstream] = field(default_factory=dict)
    refused: str | None = None
    """What patching warns of where the feature is on already and something stays unfused for it."""
    stuck: str | None = None
    """What unpatching raises while the feature is on, if that came after patching: the feature goes
    first.
    """
    gpus: int = 0
    agrees: Callable[[Any, Any], bool] = field(default=lambda observed, upstream: observed == upstream)
    """Compares the observation with the unpatched model's."""
    compiles: bool = False
    """The ops run while a run is traced; only a second one is counted."""
    slow: frozenset[str] = frozenset()
    """Orders that ``make test`` leaves to ``make test-all``."""
    in_turn: bool = False
    """Whether ``make test`` runs one cell of the row only."""
    law: Law | None = None
    """By which activations are quantised: every linear layer of the blocks with a weight that has
    them so is fused.
    """
    needs: tuple[str, ...] = ()
    """Modules that must be importable."""
    note: str = ""


def without(*families: str) -> tuple[str, ...]:
    """The families that have a feature which these don't have."""
    return tuple(family for family in FAMILIES if family not in families)


def load(family: str, dtype: torch.dtype = DTYPE) -> nn.Module:
    """The tiny model of a family, on the GPU where there is one."""
    return tiny.load(FAMILIES[family], dtype).to(DEVICE)


def arguments_of(family: str, batch: int = 2, dtype: torch.dtype = DTYPE, seed: int = 0) -> dict[str, Any]:
    """What the model is called with."""
    return moved(tiny.inputs(FAMILIES[family], batch, dtype, seed), DEVICE)  # type: ignore[no-any-return]


def forward(model: nn.Module, family: str, step: int = 0, dtype: torch.dtype = DTYPE, seed: int = 0) -> Tensor:
    """The output of the call that a scheduler makes in its ``step``."""
    arguments = arguments_of(family, dtype=dtype, seed=seed)
    for name in arguments.keys() & {"t", "timestep", "audio_timestep"}:
        arguments[name] = arguments[name] * (1 - step / 16)
    return tiny.run(model, arguments)


def output_of(model: Any, arguments: dict[str, Any]) -> Tensor:
    """What a call returns, with a graph where there is one; video and audio in one."""
    (output, *others) = model(**arguments, return_dict=False)
    if isinstance(output, list):
        return torch.stack(output)
    return torch.cat([stream.flatten(1) for stream in (output, *others)], dim=1) if others else output


def halved(output: Any) -> Any:
    """What a block or model returns, halved; SD3's last block returns None for the text, Z-Image a
    list of pictures.
    """
    if output is None:
        return None
    return type(output)(halved(o) for o in output) if isinstance(output, tuple | list) else output * 0.5


def unchanged(target: Any, folder: Path) -> Any:
    """``apply`` of a feature that is a way of running."""
    return target


# Observations


def its_output(target: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """The feature changes the output."""
    output = run()
    return output, output.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def linears_called(target: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """The feature skips or adds linear layers.

    Only those are hooked. A hook for all modules would be shown the norms of query and key too,
    which then run unfused.
    """
    called = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal called
        called += 1

    handles = [m.register_forward_hook(count) for m in modules_of(target).modules() if isinstance(m, nn.Linear)]
    try:
        return run(), called
    finally:
        for handle in handles:
            handle.remove()


def weights_at_rest(target: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """The feature keeps weights elsewhere, or in another dtype, between calls."""
    output = run()
    return output, {(name, p.device.type, p.dtype) for name, p in modules_of(target).named_parameters()}


def calls_of(owner: Any, method: str) -> Observe:
    """The feature works through ``owner.method``."""

    def observe(target: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
        with counted(owner, method) as calls:
            output = run()
        return output, len(calls)

    return observe


@contextlib.contextmanager
def counted(owner: Any, method: str) -> Iterator[list[None]]:
    """A list that grows with every call of ``owner.method``."""
    calls: list[None] = []
    original = getattr(owner, method)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    with mock.patch.object(owner, method, counting):
        yield calls


def modules_of(target: Any) -> nn.Module:
    """A pipeline's modules as one, or the model."""
    if isinstance(target, nn.Module):
        return target
    return nn.ModuleDict({name: m for name, m in target.components.items() if isinstance(m, nn.Module)})
