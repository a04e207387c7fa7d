"""Modules whose modulations come from a table: a row for each timestep, made once, instead of
Linears that run in every step.

How a row is found: the embedding of the timestep (:class:`RowEmbedding`) is asked once a forward
pass. It computes upstream's ``temb``, looks its bits up and hands row numbers, int64 [B], to the
model in its place. Upstream's code passes them on untouched, and a module that makes modulations
(:class:`Modulating`) takes an integer for a row and a float for an embedding. A block does nothing
but gather: no wait, no look-up, nothing that ``torch.compile`` or a CUDA graph would mind. The key
is bits of what goes into the Linears, so that nothing about guidance, pooled text or additional
conditions has to be known.

The weights stay the Parameters they are, in host memory. Where an embedding arrives after all
(training, autocast, a hook that looks at it) they cross to it, and the result is upstream's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...swapping.swapped import untouched

if TYPE_CHECKING:
    from .table import ModulationTable


@dataclass(frozen=True)
class ModulatedModel:
    """What a model does with the embedding of its timestep: it hands it to ``takers``, and nothing
    else reads it.
    """

    names: frozenset[str]
    """Names of the upstream classes."""
    forward: frozenset[str]
    """Fingerprints of their ``forward``."""
    embedding: str
    """The module that makes the embedding. Each tensor that it returns is one."""
    takers: tuple[str, ...]
    """Its ModuleLists of blocks and its modules that take it."""
    times: int = 1
    """By what it multiplies the timestep before it embeds it."""
    projection: str | None = None
    """The module that the timestep goes through before, where ``embedding`` is given sines and
    cosines of it.
    """
    changed_by: str | None = None
    """A module that only some instances have: what it makes is added to the embedding, for which
    no row numbers can stand in then.
    """
    halved_if: str | None = None
    """The attribute of the model that doubles the batch of the embedding, the second half for
    timestep 0; then ``halved``,
    """
    halved: tuple[str, ...] = ()
    """ends of the names of the modulations that see the first half only."""


class Modulating:
    """A module that makes modulations from an embedding [B, D], or reads them from its table where
    it is given row numbers, int64 [B].
    """

    modulation_parts: ClassVar[tuple[str, ...]] = ("linear",)
    """The sub-modules whose weights the table stands in for."""
    modulation_table: Tensor | None = None
    """[rows + 1, out_features]; the last row is NaN. None where nothing is precomputed, without
    rows where none was made yet.
    """
    modulation_changes: int
    """Beside a table: grows when a part is replaced or its dtype changes."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The sub-modules of the upstream class."""

    def modulation(self, emb: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[B, out_features]; ``dtype``: what upstream casts the activated embedding to."""
        table = self.modulation_table
        if table is None:
            emb = self.silu(emb)
            return self.linear(emb if dtype is None else emb.to(dtype))
        return self.modulation_from_weights(emb, dtype) if emb.is_floating_point() else table.index_select(0, emb)

    def modulation_from_weights(self, emb: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As upstream computes it, with weights in host memory brought to where ``emb`` is."""
        emb = self.silu(emb)
        return call_on(emb if dtype is None else emb.to(dtype), self.linear)

    def modulation_modules(self) -> list[nn.Module]:
        modules: dict[str, nn.Module] = self._modules
        return [modules[part] for part in self.modulation_parts]

    def modulation_weights(self) -> Iterator[nn.Parameter]:
        """The weights that live in host memory: dense ones. Quantised ones, which have a class of
        their own, stay where they are.
        """
        for module in self.modulation_modules():
            yield from (p for p in module.parameters() if _dense(p))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``.to(device)`` leaves the weights in host memory, and takes the table along;
        ``.to(dtype)`` changes them where they are.
        """
        if self.modulation_table is None:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        super()._apply(fn, recurse=False)  # type: ignore[misc]
        parts = self.modulation_modules()
        before = [p.dtype for p in self.modulation_weights()]
        for child in self._modules.values() if recurse else ():
            if child is not None:
                child._apply(_in_host_memory(fn) if child in parts else fn)
        if before != [p.dtype for p in self.modulation_weights()]:
            self.__dict__["modulation_changes"] += 1
        table = fn(self.modulation_table)
        self.__dict__["modulation_table"] = table if table.dtype is self.modulation_table.dtype else self.modulation_table
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "modulation_changes" in self.__dict__ and isinstance(value, nn.Module):
            self.__dict__["modulation_changes"] += 1


class ModulationSequential(Modulating):
    """``Sequential(SiLU(), Linear(...))``, Qwen-Image's ``img_mod`` and ``txt_mod``."""

    modulation_parts = ("0", "1")

    def forward(self, input: Tensor) -> Tensor:  # upstream's name
        table = self.modulation_table
        return self.modulation_from_weights(input) if table is None or input.is_floating_point() else table.index_select(0, input)

    def modulation_from_weights(self, emb: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        for module in self:  # type: ignore[attr-defined]
            emb = call_on(emb, module)
        return emb


class RowEmbedding:
    """An embedding of timesteps that returns row numbers of the table, int64 [B], in place of each
    embedding [B, D].
    """

    modulations: "ModulationTable"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        embedded = super().forward(*args, **kwargs)  # type: ignore[misc]
        tensors = embedded if isinstance(embedded, tuple) else (embedded,)
        if self._is_read_by_others(tensors[0].device.type):
            return embedded
        table = self.modulations
        given = dict(zip(table.inputs, args, strict=False)) | kwargs
        inputs = [value if isinstance(value := given.get(name), Tensor) else None for name in table.inputs]
        if torch.compiler.is_compiling():
            rows = [None if t is None else torch.ops.ditnorm.modulation_rows(t, inputs, i, table.handle) for i, t in enumerate(tensors)]
        else:
            rows = [None if t is None else table.rows(t, inputs, i) for i, t in enumerate(tensors)]
            if rows[0] is None:  # given up: the weights are back
                return embedded
        return tuple(rows) if isinstance(embedded, tuple) else rows[0]

    def _is_read_by_others(self, device: str) -> bool:
        """Whether gradients go through it, or its dtype may change on the way, or a hook looks at
        it.
        """
        return torch.is_grad_enabled() or torch.is_autocast_enabled(device) or not untouched(self)


def call_on(x: Tensor, module: nn.Module) -> Tensor:
    """``module(x)`` with those of its weights that are in host memory brought to the device of
    ``x``; gradients go back to them.
    """
    if x.device.type == "cpu":
        return module(x)
    home = {name: p for name, p in module.named_parameters() if p.device.type == "cpu"}
    if not home:
        return module(x)
    if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ditnorm: a CUDA graph can't read the weights of modulations, which are in host memory: capture it under torch.no_grad(), "
            "without autocast and without hooks on the embedding of the timestep, or after restore_modulation"
        )
    return functional_call(module, {name: p.to(x.device) for name, p in home.items()}, (x,))


def _dense(p: nn.Parameter) -> bool:
    return type(p) is nn.Parameter and p.layout is torch.strided and p.is_contiguous()


def _in_host_memory(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` without what it does about the device of tensors in host memory."""

    def apply(t: Tensor) -> Tensor:
        if t.device.type != "cpu" or not (type(t) is Tensor or (isinstance(t, nn.Parameter) and _dense(t))):
            return fn(t)
        tried = fn(torch.empty(0, dtype=t.dtype))
        if tried.device.type in ("cpu", "meta"):
            return fn(t)
        return t.data if tried.dtype is t.dtype else t.data.to(tried.dtype)

    return apply
