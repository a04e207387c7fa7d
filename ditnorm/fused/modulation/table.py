"""The table of a model's modulations: how its rows are made, and when they are out of date."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.bits import bits
from ...swapping.hook_chains import group_offloading, set_class
from ..module import FusedModule, upstream_of
from .changes import Watch
from .compiled import handle_of
from .modulated_model import ModulatedModel
from .modulating import Modulating, ModulationSequential, Precomputed
from .route import Route
from .rows import MADE_IN_FIRST_RUN, Entry, Key, RowNumbers, key_of
from .schedules import Inputs, Schedules
from .streaming import GROUP_OFFLOADED, send_home, spread, streamed, uncounted

DtypeOf = Callable[[nn.Module], torch.dtype | None]


class ModulationTable:
    """Rows for the modulations of one model, found by the bits of the embedding that they are made
    of.

    **Bits.** A row is made by the call that the model would make: the same module, its hooks and
    adapters included, on an embedding of the same shape. So there is nothing to assume about what a
    product of many rows gives. The one shortcut, a row shared by equal samples of a batch, is
    compared when the rows are made, and given up where it doesn't hold.

    **Misses.** An embedding that has no rows gets them before the forward pass goes on, together
    with those of the rest of the schedule that its timestep is found in. Weights cross to the
    device one module at a time, the next one while this one is used.

    **Waiting.** Reading the bits of the embedding, some kilobytes, waits for the device once a
    forward pass. The rest of the pass is launched while its first blocks run, as it is after any
    step; a step of a real model is a thousand times longer.

    **Changes.** Before each look-up: the identity, version, address and a sample of the bits of
    each weight, the modules around it, adapters and their scales. Any difference empties the table.
    Sampled bits see what ``weight.data`` hides from the version.

    Threads take turns at look-ups. Rows that a thread may still read are not given to others.
    """

    def __init__(
        self, model: nn.Module, embedding: nn.Module, modules: Sequence[Precomputed], dtype_of: DtypeOf, facts: ModulatedModel
    ) -> None:
        """``dtype_of``: the dtype of a model's activations."""
        self.model, self.embedding, self.dtype_of = model, embedding, dtype_of
        self.modules = list(modules)
        self.known = Schedules(model, embedding, facts)
        self.inputs = self.known.inputs
        self.hits = self.misses = self.schedules = self.changes = 0
        self.seconds = 0.0
        self._start(RowNumbers())
        self._route.trace()
        device = next((p.device for p in embedding.parameters() if p.device.type != "meta"), torch.device("cpu"))
        for _, module, _ in self.modules:  # before the first run, since compiled code and CUDA graphs hold the tables
            module.__dict__["modulation_changes"] = 0
            out_features: int = module.modulation_modules()[-1].out_features
            self._table_of(module, torch.empty(0, out_features, dtype=self.dtype, device=device))

    def _start(self, numbers: RowNumbers) -> None:
        self.handle = handle_of(self)
        self.numbers = numbers
        self._lock = threading.RLock()
        self._watch: Watch | None = None
        self._route = Route(self.model, [item.name for item in self.modules])

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; they start without rows."""
        kept = ("model", "embedding", "dtype_of", "modules", "known", "inputs", "hits", "misses", "schedules", "changes", "seconds")
        return {name: self.__dict__[name] for name in kept} | {"capacity": self.numbers.capacity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        capacity = state.pop("capacity")
        self.__dict__.update(state)
        self._start(RowNumbers(capacity))

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.dtype_of(self.model)
        assert dtype is not None
        return dtype

    @property
    def row_count(self) -> int:
        return self.numbers.taken

    @property
    def nbytes(self) -> int:
        return sum(module.modulation_table.nbytes for _, module, _ in self.modules)

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that are in host memory."""
        return sum(p.nbytes for _, module, _ in self.modules for p in module.modulation_weights() if p.device.type == "cpu")

    def __str__(self) -> str:
        host, table = self.host_bytes, self.nbytes
        return (
            f"{len(self.modules)} precomputed, {host / 1e9:.2f} GB of weights in host memory, {(host - table) / 1e9:.2f} GB saved; "
            f"{self.row_count} rows, table of {table / 1e9:.3f} GB; {self.hits} hits, {self.schedules} schedules and {self.misses} other "
            f"timesteps made in {self.seconds:.2f} s, {self.changes} changes of weights"
        )

    def rows(self, embedding: Tensor, inputs: Inputs, output: int) -> Tensor | None:
        """The rows of ``embedding`` [B, D], the tensor number ``output`` that the embedding module
        makes of ``inputs``: int64 [B].

        None where the weights are to be used: in this call, since something in them is random, or
        from now on, since the model was changed so that it can't take rows. Then everything is
        restored, with a warning.
        """
        if embedding.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._captured(embedding)
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),  # inference_mode(False), without which later runs couldn't write rows, enables gradients
        ):
            reason = self._reason_to_give_up() or self._look_for_changes()
            if reason is not None:
                self.restore()
                warnings.warn(
                    f"ditnorm: modulations of {type(self.model).__name__} aren't precomputed any more: {reason}", UserWarning, stacklevel=2
                )
                return None
            if self._watch is not None and self._watch.is_random():
                return None
            key = key_of(embedding)
            entry = self.numbers.find(key)
            if entry is None:
                entry = self._make(key, embedding, inputs, output)
            else:
                self.hits += 1
            return entry.tensor(embedding.device)

    def rows_for_compiled(self, embedding: Tensor, inputs: Inputs, output: int) -> Tensor:
        """:meth:`rows`, as a new tensor.

        Raises:
            RuntimeError: where :meth:`rows` gives None.
        """
        self.numbers.fixed = True  # the compiled code holds the tables that it saw
        rows = self.rows(embedding, inputs, output)
        if rows is None:
            raise RuntimeError(
                "ditnorm: compiled code has no rows to read: modulations aren't precomputed any more (a warning says why; compile the "
                "model again), or an adapter in them drops at random (call eval() on the model)"
            )
        return rows.clone()

    def restore(self, bring: bool = True) -> None:
        """Upstream's classes come back, and the weights go to where the model is by now, unless
        ``bring`` is False.
        """
        ours = {id(p) for _, module, _ in self.modules if isinstance(module, Modulating) for p in module.modulation_weights()}
        device = next((p.device for p in self.model.parameters() if id(p) not in ours and p.device.type != "meta"), torch.device("cpu"))
        set_class(self.embedding, upstream_of(type(self.embedding)))
        del self.embedding.__dict__["modulations"]
        for _, module, _ in self.modules:
            parts = module.modulation_modules() if isinstance(module, Modulating) else list(module.children())
            held = [t for part in parts for t in (*part.parameters(), *part.buffers())] if bring else []
            for p in (t for t in held if t.device.type == "cpu"):
                with torch.inference_mode(p.is_inference()):  # what is made in the other mode would change what p is
                    p.data = p.data.clone() if device.type == "cpu" and p.data.is_pinned() else p.data.to(device)
            for attribute in ("modulation_table", "modulation_changes"):
                module.__dict__.pop(attribute, None)
            if issubclass(type(module), ModulationSequential):
                set_class(module, upstream_of(type(module)))

    # Making rows.

    def _make(self, key: Key, embedding: Tensor, inputs: Inputs, output: int) -> Entry:
        started = time.perf_counter()
        following = self.known.rest(inputs, output, embedding.dtype, self.dtype)
        self.misses += not following
        self.schedules += bool(following)
        wanted = {key: embedding} | {k: e for e in following if (k := key_of(e)) not in self.numbers and k != key}
        entries = self.numbers.planned(wanted)
        made = [wanted[k] for k in entries]
        if not self._fill(list(zip(made, entries.values(), strict=True)), embedding.device):
            self.numbers.shared = False
            self.numbers.clear()
            return self._make(key, embedding, inputs, output)
        self.numbers.add(entries, made)
        self._watch = Watch(self.modules)
        self.seconds += time.perf_counter() - started
        return entries[key]

    def _fill(self, work: list[tuple[Tensor, Entry]], device: torch.device) -> bool:
        """Makes the rows, module by module. False where equal samples of a batch gave other bits,
        so that they can't share a row.
        """
        unequal = torch.zeros((), dtype=torch.bool, device=device)
        dtype = self.dtype
        for _, module, _ in self.modules:
            send_home(module)
        for _, module, halved in _progress(streamed(self.modules, device), len(self.modules)):
            rows, made = [], []
            for embedding, entry in work:
                seen = embedding.chunk(2)[0] if halved else embedding
                index = entry.index[: len(seen)]
                y = module.modulation_from_weights(seen, dtype)
                first = [index.index(row) for row in dict.fromkeys(index)]
                rows += [index[i] for i in first]
                if len(first) < len(index):
                    position = torch.tensor([index.index(row) for row in index], device=y.device)
                    unequal |= (bits(y) != bits(y)[position]).any().to(device)
                    y = y[torch.tensor(first, device=y.device)]
                made.append(y)
            table = self._table_of(module, made[0])
            table.index_copy_(0, torch.tensor(rows, device=table.device), torch.cat(made))
        return not unequal.item()

    def _table_of(self, module: Any, like: Tensor) -> Tensor:
        """The table of a module, new or larger where need be, with the rows that it has."""
        table: Tensor | None = module.modulation_table
        fits = table is not None and (table.dtype, table.device) == (like.dtype, like.device)
        if table is not None and fits and len(table) == self.numbers.capacity + 1 and not table.is_inference():
            return table
        new = like.new_full((self.numbers.capacity + 1, like.shape[-1]), float("nan"))
        if table is not None and fits:
            new[: len(table) - 1] = table[:-1]
        module.__dict__["modulation_table"] = new
        return new

    # Noticing changes.

    def _reason_to_give_up(self) -> str | None:
        """Whether somebody who doesn't know of row numbers would be given some now."""
        reason = self._route.lost()
        if reason is not None:
            return reason
        for name, module, _ in self.modules:
            if not isinstance(module, Modulating) or (isinstance(module, FusedModule) and not module.intact()):
                return f"{name} isn't fused any more"
        for part in self._watch.parts.values if self._watch is not None else ():
            if "_diffusers_hook" in part.__dict__ and group_offloading(part) is not None:
                return GROUP_OFFLOADED
        return None

    def _look_for_changes(self) -> str | None:
        """Empties the table where weights have changed; a reason to give it up where they were
        sharded, or others were put in whose changes nobody counts.
        """
        if self._watch is not None and self._watch.unchanged():
            return None
        self.changes += bool(self.numbers)
        self.numbers.clear()
        reason = next((reason for _, module, _ in self.modules if (reason := spread(module) or uncounted(module)) is not None), None)
        if reason is None:
            self._watch = Watch(self.modules)
        return reason

    def _captured(self, embedding: Tensor) -> Tensor:
        """The look-up for a CUDA graph: what has no row when the graph is replayed becomes NaN."""
        if self._watch is None or not self._watch.unchanged() or not self.numbers:
            raise RuntimeError(MADE_IN_FIRST_RUN)
        return self.numbers.find_on_device(embedding)


def _progress(items: Iterator[Any], total: int) -> Iterator[Any]:
    """Shows a bar from the first second on, unless diffusers' progress bars are off."""
    from diffusers.utils import logging

    yield from logging.tqdm(items, total=total, desc="ditnorm: modulations", delay=1.0, leave=False)
