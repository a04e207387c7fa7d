"""Which rows of a table of modulations belong to which embedding."""

import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops.bits import bits

Key = tuple[tuple[int, ...], torch.dtype, bytes]
"""Shape, dtype and bits of an embedding."""

_ROWS, _STEP = 128, 64  # two schedules of 50 steps, as guidance with two pooled texts needs
MADE_IN_FIRST_RUN = "ditnorm: modulations are made in the first run: run the model once before its capture"
_IN_USE = 4  # embeddings of one forward pass, and of the one before it in the same thread


def key_of(embedding: Tensor) -> Key:
    """Reads the bits from the device."""
    return tuple(embedding.shape), embedding.dtype, embedding.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()


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
        """The numbers, int64 [B]."""
        if device not in self.on:
            self.on[device] = torch.tensor(self.index, device=device)
        return self.on[device]


class RowNumbers:
    """The numbers of rows, which embedding has which, and which are free.

    An embedding keeps its rows until others need them and it is the longest unused. Rows that a
    thread may still read are not given to others.
    """

    def __init__(self, capacity: int = _ROWS) -> None:
        self.capacity = capacity
        self.fixed = False
        """Whether compiled code or a CUDA graph reads tables of this capacity."""
        self.shared = True
        """Whether equal samples of a batch have one row."""
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._free: list[int] = list(range(capacity))
        self._in_use: dict[int, deque[Key]] = defaultdict(lambda: deque(maxlen=_IN_USE))
        self._on_device: dict[tuple[torch.dtype, torch.device, torch.Size], tuple[Tensor, Tensor]] = {}
        """For embeddings of one kind: the sample that each row was made of, [capacity, D], and how
        many samples its embedding had, [capacity], 0 for a row of none.
        """

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __bool__(self) -> bool:
        """Whether any embedding has rows."""
        return bool(self._entries)

    @property
    def taken(self) -> int:
        """How many rows aren't free."""
        return self.capacity - len(self._free)

    def find(self, key: Key) -> Entry | None:
        """The rows of an embedding that this thread uses from now on."""
        self._in_use[threading.get_ident()].append(key)
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def planned(self, wanted: Iterable[Key]) -> dict[Key, Entry]:
        """Entries with free rows; of more than fit, the first. The rows stay free until
        :meth:`add`.

        Raises:
            RuntimeError: where there is no room for the first, and no more can be made.
        """
        samples = {key: self._samples(key) for key in wanted}
        needed = sum(len(set(numbers)) for numbers in samples.values())
        self._evict(needed, samples.keys())
        if len(self._free) < needed and not self.fixed:
            self._grow(needed)
        free, entries = list(self._free), {}
        for key, numbers in samples.items():
            if len(set(numbers)) > len(free):
                break
            rows = {number: free.pop() for number in dict.fromkeys(numbers)}
            entries[key] = Entry([rows[number] for number in numbers])
        if not entries:
            raise RuntimeError(
                "ditnorm: a compiled model or a CUDA graph reads a table that has no room for this batch: call restore_modulation and "
                "precompute_modulation, and run the largest batch once before you compile or capture"
            )
        return entries

    def add(self, entries: dict[Key, Entry], embeddings: Sequence[Tensor]) -> None:
        """Gives the ``embeddings`` their rows. The first is the one in use."""
        for embedding, entry in zip(embeddings, entries.values(), strict=True):
            self._remember(embedding, entry)
        taken = {row for entry in entries.values() for row in entry.rows}
        self._free = [row for row in self._free if row not in taken]
        self._entries |= entries
        self._entries.move_to_end(next(iter(entries)))

    def clear(self) -> None:
        """Takes all rows back."""
        self._entries.clear()
        self._free.clear()
        self._forget(list(range(self.capacity)))

    def find_on_device(self, embedding: Tensor) -> Tensor:
        """The look-up as operations on the device, for a CUDA graph: int64 [B], ``capacity`` for
        what has no row when the graph is replayed.

        Raises:
            RuntimeError: where no such embedding ever had rows, or equal samples don't share one.
        """
        if not self.shared:
            raise RuntimeError(
                "ditnorm: on this device equal samples of a batch have unequal modulations, which a CUDA graph can't look up: call "
                "restore_modulation before the capture"
            )
        if _kind(embedding) not in self._on_device:
            raise RuntimeError(MADE_IN_FIRST_RUN)
        self.fixed = True
        keys, batches = self._on_device[_kind(embedding)]
        same = (bits(keys) == bits(embedding)[:, None]).all(-1) & (batches == len(embedding))
        return torch.where(same.any(1), same.int().argmax(1), self.capacity)

    def _samples(self, key: Key) -> list[int]:
        """A number for each sample of the embedding, the same for the same bits."""
        shape, _, bits_of_all = key
        size = len(bits_of_all) // shape[0]
        seen: dict[bytes, int] = {}
        numbers = [seen.setdefault(bits_of_all[i * size : (i + 1) * size], i) for i in range(shape[0])]
        return numbers if self.shared else list(range(shape[0]))

    def _grow(self, rows: int) -> None:
        grown = -(-(self.capacity + rows) // _STEP) * _STEP
        self._free += range(self.capacity, grown)
        self.capacity = grown

    def _evict(self, needed: int, wanted: Container[Key]) -> None:
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

    def _remember(self, embedding: Tensor, entry: Entry) -> None:
        keys, batches = self._on_device.get(_kind(embedding)) or (embedding[:0], torch.zeros(0, dtype=torch.int64, device=embedding.device))
        new = self.capacity - len(keys)
        if new:
            keys = torch.cat([keys, keys.new_zeros(new, *keys.shape[1:])])
            batches = torch.cat([batches, batches.new_zeros(new)])
            self._on_device[_kind(embedding)] = keys, batches
        index = entry.tensor(embedding.device)
        keys[index] = embedding
        batches[index] = len(embedding)

    def _forget(self, rows: list[int]) -> None:
        self._free += rows
        for _, batches in self._on_device.values():
            batches[[row for row in rows if row < len(batches)]] = 0


def _kind(embedding: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return embedding.dtype, embedding.device, embedding.shape[1:]
