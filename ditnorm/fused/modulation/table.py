"""The table of a model's modulations: which rows it has, how they are made, when they are out of
date.
"""

import inspect
import itertools
import threading
import time
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...swapping.generated import origin_of
from ...swapping.hook_chains import Untraceable, captured, set_class
from ..module import FusedModule, upstream_of
from .changes import Watch
from .modulating import ModulatedModel, Modulating, ModulationSequential
from .streaming import send_home, streamed

GROUP_OFFLOADED = "group offloading moves the weights in its own order, and keeps those of modulations off the device as it is"

Key = tuple[tuple[int, ...], torch.dtype, bytes]
Inputs = Sequence[Tensor | None]
DtypeOf = Callable[[nn.Module], torch.dtype | None]

_ROWS, _STEP = 128, 64  # two schedules of 50 steps, as guidance with two pooled texts needs
_IN_USE = 4  # embeddings of one forward pass, and of the one before it in the same thread


@dataclass
class Entry:
    """The rows of one embedding [B, D]: a number for each of its B samples. Equal samples share a
    row.
    """

    index: list[int]
    on: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Each row once, in the order of the samples."""
        return list(dict.fromkeys(self.index))

    def tensor(self, device: torch.device) -> Tensor:
        if device not in self.on:
            self.on[device] = torch.tensor(self.index, device=device)
        return self.on[device]


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
        self, model: nn.Module, embedding: nn.Module, holders: Sequence[tuple[str, Any, bool]], dtype_of: DtypeOf, facts: ModulatedModel
    ) -> None:
        """``holders``: name, a :class:`Modulating` module, and whether it sees the first half of
        the embedding only.

        ``dtype_of``: the dtype of a model's activations.
        """
        self.model, self.embedding = model, embedding
        self.holders = list(holders)
        self.dtype_of, self.times, self.projection = dtype_of, facts.times, facts.projection
        upstream: Any = origin_of(type(embedding)) or type(embedding)
        self.inputs = tuple(inspect.signature(upstream.forward).parameters)[1:]
        self.timesteps: Tensor | None = None
        self.hits = self.misses = self.schedules = self.changes = 0
        self.seconds = 0.0
        self._capacity = _ROWS
        self._start()
        self._trace()
        device = next((p.device for p in embedding.parameters() if p.device.type != "meta"), torch.device("cpu"))
        for _, holder, _ in self.holders:  # already now: what is compiled or captured holds them
            holder.__dict__["modulation_changes"] = 0
            out_features: int = holder.modulation_modules()[-1].out_features
            self._table_of(holder, torch.empty(0, out_features, dtype=self.dtype, device=device))

    def _start(self) -> None:
        self.pipelines: list[weakref.ref[Any]] = []
        self.handle = next(_handles)
        _tables[self.handle] = self
        self._lock = threading.RLock()
        self._in_use: dict[int, deque[Key]] = defaultdict(lambda: deque(maxlen=_IN_USE))
        self._shared_rows = True
        self._fixed = False
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._free: list[int] = list(range(self._capacity))
        self._watch: Watch | None = None
        self._path: list[tuple[str, dict[str, Any], str, nn.Module]] = []
        self._traced: dict[int, Any] = {}
        self._keys: Tensor | None = None
        self._batches: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which start without rows. Whose schedule a copy will follow isn't
        known.
        """
        kept = ("model", "embedding", "holders", "dtype_of", "times", "projection", "inputs", "timesteps", "_capacity")
        counters = ("hits", "misses", "schedules", "changes", "seconds")
        return {name: self.__dict__[name] for name in (*kept, *counters)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.dtype_of(self.model)
        assert dtype is not None
        return dtype

    @property
    def row_count(self) -> int:
        return self._capacity - len(self._free)

    @property
    def nbytes(self) -> int:
        return sum(holder.modulation_table.nbytes for _, holder, _ in self.holders)

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that are in host memory."""
        return sum(p.nbytes for _, holder, _ in self.holders for p in holder.modulation_weights() if p.device.type == "cpu")

    def __str__(self) -> str:
        host, table = self.host_bytes, self.nbytes
        return (
            f"{len(self.holders)} precomputed, {host / 1e9:.2f} GB of weights in host memory, {(host - table) / 1e9:.2f} GB saved; "
            f"{self.row_count} rows, table of {table / 1e9:.3f} GB; {self.hits} hits, {self.schedules} schedules and {self.misses} other "
            f"timesteps made in {self.seconds:.2f} s, {self.changes} changes of weights"
        )

    def follow(self, pipeline: Any) -> None:
        """Takes schedules from the scheduler that ``pipeline`` has at the time."""
        if all(known() is not pipeline for known in self.pipelines):
            self.pipelines = [known for known in self.pipelines if known() is not None] + [weakref.ref(pipeline)]

    def rows(self, embedding: Tensor, inputs: Inputs, output: int) -> Tensor | None:
        """The rows of ``embedding`` [B, D], the tensor number ``output`` that the embedding module
        makes of ``inputs``: int64 [B].

        None where the model was changed so that it can't take them: everything is restored then,
        with a warning.
        """
        if embedding.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._captured(embedding)
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # the first, which would let later runs write rows, enables gradients
            reason = self._reason_to_give_up() or self._look_for_changes()
            if reason is not None:
                self.restore()
                warnings.warn(
                    f"ditnorm: modulations of {type(self.model).__name__} aren't precomputed any more: {reason}", UserWarning, stacklevel=2
                )
                return None
            key = _key(embedding)
            self._in_use[threading.get_ident()].append(key)
            entry = self._entries.get(key)
            if entry is None:
                entry = self._make(key, embedding, inputs, output)
            else:
                self.hits += 1
            self._entries.move_to_end(key)
            return entry.tensor(embedding.device)

    # Making rows.

    def _make(self, key: Key, embedding: Tensor, inputs: Inputs, output: int) -> Entry:
        started = time.perf_counter()
        following = self._rest_of_schedule(inputs, output, embedding.dtype)
        self.misses += not following
        self.schedules += bool(following)
        wanted = {key: embedding} | {k: e for e in following if (k := _key(e)) not in self._entries and k != key}
        entries = self._numbered(wanted)
        if not self._fill([(wanted[k], entry) for k, entry in entries.items()], embedding.device):
            self._shared_rows = False
            self._clear()
            return self._make(key, embedding, inputs, output)
        self._entries |= entries
        self._watch = Watch(self.holders)
        self.seconds += time.perf_counter() - started
        return entries[key]

    def _rest_of_schedule(self, inputs: Inputs, output: int, dtype: torch.dtype) -> list[Tensor]:
        """The embeddings from this step of a known schedule on; none where the timestep is in no
        schedule.
        """
        given: dict[str, Any] = {name: value for name, value in zip(self.inputs, inputs, strict=True) if value is not None}
        if self.projection is not None:
            return self._rest_projected(given, output)
        timestep = given.get("timestep")
        if timestep is None or not timestep.numel():
            return []
        given |= {name: dtype for name in self.inputs if name.endswith("dtype")}  # which the embedding was asked for
        value = timestep.flatten()[0]
        for timesteps in self._known_schedules():
            timesteps = timesteps.to(timestep.device)
            for form, taken in enumerate(_as_models_take_them(timesteps, timestep.dtype, self.times)):
                found = (taken == value).nonzero().flatten().tolist()
                if found:
                    now = found[0]
                    rest = [self._embedded(given, value, taken, step, output) for step in range(now, len(taken))]
                    if timestep.dtype is not self.dtype:  # as HunyuanVideo's latents, and timesteps, are from step 2 on
                        taken = _as_models_take_them(timesteps, self.dtype, self.times)[form]
                        rest += [self._embedded(given, value, taken, step, output) for step in range(now + 1, len(taken))]
                    return rest
        return []

    def _rest_projected(self, given: dict[str, Any], output: int) -> list[Tensor]:
        """The same where the embedding is given a projection [B, N] of the timestep, the first of
        its arguments.
        """
        name, sample = next(iter(given.items()))
        project: Any = self.model.get_submodule(str(self.projection))
        upstream: Any = origin_of(type(self.embedding))
        for timesteps in self._known_schedules():
            for taken in _as_models_take_them(timesteps.to(sample.device), self.dtype, self.times):
                projected = project(taken).to(sample.dtype)
                found = (projected == sample[0]).all(-1).nonzero().flatten().tolist()
                if found:
                    rest = (torch.where((sample == sample[0]).all(-1, keepdim=True), step, sample) for step in projected[found[0] :])
                    embedded = (upstream.forward(self.embedding, **(given | {name: step})) for step in rest)
                    return [e[output] if isinstance(e, tuple) else e for e in embedded]
        return []

    def _known_schedules(self) -> Iterator[Tensor]:
        if self.timesteps is not None:
            yield self.timesteps
        for pipeline in self.pipelines:
            timesteps = getattr(getattr(pipeline(), "scheduler", None), "timesteps", None)
            if isinstance(timesteps, Tensor) and timesteps.ndim == 1:
                yield timesteps

    def _embedded(self, given: dict[str, Any], now: Tensor, taken: Tensor, step: int, output: int) -> Tensor:
        """What the embedding makes of ``given`` with the timestep of another step. Other values
        beside it, a 0 for instance, stay.
        """
        timestep = given["timestep"]
        changed = {"timestep": torch.where(timestep == now, taken[step], timestep.to(taken.dtype))}
        if "timestep_r" in given:  # the timestep of the next step, and 0 at the end
            changed["timestep_r"] = (
                torch.zeros_like(changed["timestep"]) + taken[step + 1] if step + 1 < len(taken) else changed["timestep"] * 0
            )
        upstream: Any = origin_of(type(self.embedding))
        embedded = upstream.forward(self.embedding, **(given | changed))
        return embedded[output] if isinstance(embedded, tuple) else embedded

    def _numbered(self, wanted: dict[Key, Tensor]) -> dict[Key, Entry]:
        """Entries with rows that nobody uses; of more than fit, the first."""
        samples = {key: self._samples(key) for key in wanted}
        needed = sum(len(set(numbers)) for numbers in samples.values())
        self._evict(needed, samples.keys())
        if len(self._free) < needed and not self._fixed:
            self._grow(needed)
        entries = {}
        for key, numbers in samples.items():
            if len(set(numbers)) > len(self._free):
                break
            rows = {number: self._free.pop() for number in dict.fromkeys(numbers)}
            entries[key] = Entry([rows[number] for number in numbers])
        for entry in entries.values():  # until they are made
            self._free += entry.rows
        if next(iter(wanted)) not in entries:
            raise RuntimeError("ditnorm: a compiled model or a CUDA graph reads a table that has no room for this batch")
        return entries

    def _samples(self, key: Key) -> list[int]:
        """A number for each sample of the embedding, the same for the same bits."""
        shape, _, bits = key
        size = len(bits) // shape[0]
        seen: dict[bytes, int] = {}
        numbers = [seen.setdefault(bits[i * size : (i + 1) * size], i) for i in range(shape[0])]
        return numbers if self._shared_rows else list(range(shape[0]))

    def _grow(self, rows: int) -> None:
        grown = -(-(self._capacity + rows) // _STEP) * _STEP
        self._free += range(self._capacity, grown)
        self._capacity = grown

    def _evict(self, needed: int, wanted: Any) -> None:
        """Frees rows of the longest unused entries until there are ``needed``."""
        if len(self._free) >= needed:
            return
        alive = {thread.ident for thread in threading.enumerate()}
        self._in_use = defaultdict(lambda: deque(maxlen=_IN_USE), {t: keys for t, keys in self._in_use.items() if t in alive})
        kept = {key for keys in self._in_use.values() for key in keys}
        for key in [key for key in self._entries if key not in kept and key not in wanted]:
            if len(self._free) >= needed:
                break
            self._forget(self._entries.pop(key).rows)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # other streams may still read these rows

    def _fill(self, work: list[tuple[Tensor, Entry]], device: torch.device) -> bool:
        """Makes the rows, module by module. False where equal samples of a batch gave other bits,
        so that they can't share a row.
        """
        unequal = torch.zeros((), dtype=torch.bool, device=device)
        dtype = self.dtype
        for _, holder, _ in self.holders:
            send_home(holder)
        for _, holder, halved in _progress(streamed(self.holders, device), len(self.holders)):
            rows, made = [], []
            for embedding, entry in work:
                seen = embedding.chunk(2)[0] if halved else embedding
                index = entry.index[: len(seen)]
                y = holder.modulation_from_weights(seen, dtype)
                first = [index.index(row) for row in dict.fromkeys(index)]
                rows += [index[i] for i in first]
                if len(first) < len(index):
                    position = torch.tensor([index.index(row) for row in index], device=y.device)
                    unequal |= (_bits(y) != _bits(y)[position]).any().to(device)
                    y = y[torch.tensor(first, device=y.device)]
                made.append(y)
            table = self._table_of(holder, made[0])
            table.index_copy_(0, torch.tensor(rows, device=table.device), torch.cat(made))
        if unequal.item():
            return False
        for embedding, entry in work:
            self._remember(embedding, entry)
        taken = {row for _, entry in work for row in entry.rows}
        self._free = [row for row in self._free if row not in taken]
        return True

    def _table_of(self, holder: Any, like: Tensor) -> Tensor:
        """The table of a module, new or larger where need be, with the rows that it has."""
        table: Tensor | None = holder.modulation_table
        fits = table is not None and (table.dtype, table.device) == (like.dtype, like.device)
        if table is not None and fits and len(table) == self._capacity + 1:
            return table
        new = like.new_full((self._capacity + 1, like.shape[-1]), float("nan"))
        if table is not None and fits:
            new[: len(table) - 1] = table[:-1]
        holder.__dict__["modulation_table"] = new
        return new

    # Noticing changes.

    def _reason_to_give_up(self) -> str | None:
        """Whether somebody who doesn't know of row numbers would be given some now."""
        if not self._path and (lost := self._trace()) is not None:
            return f"{lost} was replaced"
        for name, siblings, key, module in self._path:
            if siblings.get(key) is not module and getattr(siblings.get(key), "_orig_mod", None) is not module:
                return f"{name} was replaced"
            if "_diffusers_hook" in module.__dict__ and is_group_offloaded(module):
                return GROUP_OFFLOADED
            forward = module.__dict__.get("forward")
            if forward is not None and self._traced.get(id(module)) is not forward:
                try:
                    captured(module)
                except Untraceable as untraceable:
                    return f"{name}: {untraceable}"
                self._traced[id(module)] = forward
        for name, holder, _ in self.holders:
            if not isinstance(holder, Modulating) or (isinstance(holder, FusedModule) and not holder.intact()):
                return f"{name} isn't fused any more"
        for part in self._watch.parts.values if self._watch is not None else ():
            if "_diffusers_hook" in part.__dict__ and is_group_offloaded(part):
                return GROUP_OFFLOADED
        return None

    def _trace(self) -> str | None:
        """Notes the modules from the model down to its modulations; the name of one that isn't
        there, if any.
        """
        paths = [holder.split(".") for holder, _, _ in self.holders]
        for name in dict.fromkeys(".".join(path[:n]) for path in paths for n in range(1, len(path) + 1)):
            try:
                self._path.append((name, *_link(self.model, name)))
            except (AttributeError, KeyError):
                return name
        return None

    def restore(self, bring: bool = True) -> None:
        """Upstream's classes come back, and the weights go to where the model is by now, unless
        ``bring`` is False.
        """
        ours = {id(p) for _, holder, _ in self.holders if isinstance(holder, Modulating) for p in holder.modulation_weights()}
        device = next((p.device for p in self.model.parameters() if id(p) not in ours and p.device.type != "meta"), torch.device("cpu"))
        set_class(self.embedding, upstream_of(type(self.embedding)))
        del self.embedding.__dict__["modulations"]
        for _, holder, _ in self.holders:
            parts = holder.modulation_modules() if isinstance(holder, Modulating) else list(holder.children())
            for p in (p for part in parts for p in part.parameters() if bring and p.device.type == "cpu"):
                p.data = p.data.clone() if device.type == "cpu" and p.data.is_pinned() else p.data.to(device)
            for attribute in ("modulation_table", "modulation_changes"):
                holder.__dict__.pop(attribute, None)
            if issubclass(type(holder), ModulationSequential):
                set_class(holder, upstream_of(type(holder)))

    def _look_for_changes(self) -> str | None:
        """Empties the table where weights have changed; a reason to give it up where they were
        sharded.
        """
        if self._watch is not None and self._watch.unchanged():
            return None
        self.changes += bool(self._entries)
        self._clear()
        self._watch = Watch(self.holders)
        return next((reason for _, holder, _ in self.holders if (reason := spread(holder)) is not None), None)

    def _clear(self) -> None:
        self._entries.clear()
        self._free.clear()
        self._forget(list(range(self._capacity)))

    # CUDA graphs.

    def _captured(self, embedding: Tensor) -> Tensor:
        """The look-up as operations on the device, for a graph: what has no row when the graph is
        replayed becomes NaN.
        """
        unchanged = self._watch is not None and self._watch.unchanged()
        if not unchanged or not self._entries or self._keys is None or self._batches is None:
            raise RuntimeError("ditnorm: modulations are made in the first run: run the model once before its capture")
        if not self._shared_rows:
            raise RuntimeError("ditnorm: on this device equal samples of a batch have unequal modulations, which a graph can't look up")
        self._fixed = True
        same = (_bits(self._keys) == _bits(embedding)[:, None]).all(-1) & (self._batches == len(embedding))
        return torch.where(same.any(1), same.int().argmax(1), self._capacity)

    def _remember(self, embedding: Tensor, entry: Entry) -> None:
        shape = (self._capacity, *embedding.shape[1:])
        if self._keys is None or self._keys.shape != shape or (self._keys.dtype, self._keys.device) != (embedding.dtype, embedding.device):
            self._keys = embedding.new_zeros(shape)
            self._batches = torch.zeros(self._capacity, dtype=torch.int64, device=embedding.device)
        index = entry.tensor(embedding.device)
        self._keys[index] = embedding
        self._batches[index] = len(embedding)  # type: ignore[index]

    def _forget(self, rows: list[int]) -> None:
        self._free += rows
        if self._batches is not None:
            self._batches[torch.tensor(rows, device=self._batches.device)] = 0


def _link(model: nn.Module, name: str) -> tuple[dict[str, Any], str, nn.Module]:
    """The dict that holds the module ``name`` of ``model``, its key there, and the module."""
    parent, _, key = name.rpartition(".")
    siblings: dict[str, Any] = model.get_submodule(parent)._modules
    return siblings, key, siblings[key]


def is_group_offloaded(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    return getattr(registry, "hooks", {}).get("group_offloading") is not None


def spread(model: nn.Module) -> str | None:
    """The first parameter that is on several devices (FSDP, tensor parallelism), in words."""
    for name, p in model.named_parameters():
        if hasattr(p, "placements") or type(p).__module__.startswith("torch.distributed"):
            return f"{name} is spread over several devices ({type(p).__name__})"
    return None


def _key(embedding: Tensor) -> Key:
    """The bits, read from the device."""
    return tuple(embedding.shape), embedding.dtype, embedding.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _bits(t: Tensor) -> Tensor:
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _as_models_take_them(timesteps: Tensor, dtype: torch.dtype, times: int) -> list[Tensor]:
    """What pipelines make of the timesteps of a scheduler before a model gets them, in each way
    that there is, ``times`` what the model makes of that.
    """
    if not dtype.is_floating_point:
        return [timesteps.to(dtype) * times]
    forms = [timesteps.to(dtype), timesteps.to(dtype) / 1000, (timesteps / 1000).to(dtype)]
    return forms if times == 1 else [form * times for form in forms]


def _progress(items: Iterator[Any], total: int) -> Iterator[Any]:
    """Shows a bar from the first second on, unless diffusers' progress bars are off."""
    from diffusers.utils import logging

    yield from logging.tqdm(items, total=total, desc="ditnorm: modulations", delay=1.0, leave=False)


_handles = itertools.count()
_tables: "weakref.WeakValueDictionary[int, ModulationTable]" = weakref.WeakValueDictionary()


def _rows(embedding: Tensor, inputs: list[Tensor | None], output: int, handle: int) -> Tensor:
    table = _tables[handle]
    table._fixed = True  # the compiled code holds the tables that it saw
    rows = table.rows(embedding, inputs, output)
    if rows is None:
        raise RuntimeError("ditnorm: modulations aren't precomputed any more (a warning says why): compile the model again")
    return rows.clone()


def _rows_fake(embedding: Tensor, inputs: list[Tensor | None], output: int, handle: int) -> Tensor:
    return embedding.new_empty(embedding.shape[0], dtype=torch.int64)


_library = torch.library.Library("ditnorm", "FRAGMENT")
_library.define(
    "modulation_rows(Tensor embedding, Tensor?[] inputs, int output, int handle) -> Tensor",
    tags=tuple(
        tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None
    ),  # it reads the embedding's bits: Inductor's graphs end before it and begin after it
)
_library.impl("modulation_rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("ditnorm::modulation_rows", _rows_fake, lib=_library)
