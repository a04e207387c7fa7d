"""Modules that make modulations, or read them from a table; their weights may be in host memory."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Modulating:
    """A module that makes modulations from an embedding [B, D], or reads them from its table where
    it is given row numbers, int64 [B].
    """

    modulation_parts: ClassVar[tuple[str, ...]] = ("silu", "linear")
    """The sub-modules that the table stands in for, that with ``out_features`` last."""
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


class Precomputed(NamedTuple):
    """A module of a model whose modulations come from a table."""

    name: str
    """The module's name in the model."""
    module: Any
    """:class:`Modulating`, as long as nobody changes its class."""
    halved: bool
    """Whether it sees the first half of the embedding only."""


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


def call_on(x: Tensor, module: nn.Module) -> Tensor:
    """``module(x)`` with those of its weights that are in host memory brought to the device of
    ``x``; gradients go back to them.
    """
    if x.device.type == "cpu":
        return module(x)
    held = *module.named_parameters(), *module.named_buffers()
    home = {name: p for name, p in held if p.device.type == "cpu"}
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
