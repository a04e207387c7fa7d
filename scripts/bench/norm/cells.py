"""What is measured: the table of cells, as data, and the tensors of a cell."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cell import DTYPES

MODULATIONS = {
    "norm_scale_shift": ("scale", "shift"),
    "scale_residual_norm_scale_shift": ("gate", "scale", "shift"),
    "scale_residual": ("gate",),
}
NSS, SRNSS, SR = MODULATIONS
ABBREVIATIONS = {NSS: "nss", SRNSS: "srnss", SR: "sr"}
INDEX_ROWS = 2  # Qwen-Image-Edit and HunyuanVideo's token replace choose between two modulations
FAST_WIDTH_STEP = 8  # elements: the fast kernels take multiples of it


@dataclass(frozen=True)
class Cell:
    """One call at one size: B = 1, ``rows`` tokens of ``width`` elements."""

    op: str
    rows: int
    width: int
    layout: str = "sample"
    """Of the modulations: sample [1, D], token [1, S, D], frame [1, F, 1, D], index (rows [2, D]
    and an index [S]).
    """
    gate_layout: str | None = None
    """Of the gate, where it differs."""
    dtype: str = "bf16"
    modulation: str = ""
    """dtype of the modulations; that of x if not given."""
    norm: str = "layer"
    affine: bool = False
    tables: bool = False
    """A float32 table [D] for every modulation."""
    views: bool = False
    """Modulations are chunk views of one tensor [..., 6, D]."""
    frames: int = 0
    group: str = "variants"
    """anchors (the sizes of real models), pr14717 (the tables of sglang's pull request) or
    variants.
    """
    autotune: bool = False
    """Whether torch.compile's max-autotune takes part."""

    @property
    def modulation_dtype(self) -> str:
        return self.modulation or self.dtype

    @property
    def compiled(self) -> bool:
        """Whether torch.compile takes part: hundreds of other cells would take it hours."""
        return self.group == "anchors"

    @property
    def per_sample(self) -> bool:
        return self.layout == "sample" and self.gate_layout is None

    @property
    def aligned(self) -> bool:
        return self.width % FAST_WIDTH_STEP == 0

    @property
    def name(self) -> str:
        """A readable identifier, which ``--cells`` matches."""
        modulation = self.layout if self.gate_layout is None else f"{self.layout},gate-{self.gate_layout}"
        parts = [ABBREVIATIONS[self.op], f"{self.rows}x{self.width}", modulation, self.dtype]
        if self.modulation_dtype != self.dtype:
            parts.append(f"mod-{self.modulation_dtype}")
        flags = {"rms": self.norm == "rms", "affine": self.affine, "tables": self.tables, "views": self.views}
        return "/".join([*parts, *(flag for flag, given in flags.items() if given)])

    @property
    def streams(self) -> tuple[int, int, int]:
        """Reads, writes and bytes of a stream: the plain copy that moves the same bytes in the same
        mix.

        A stream is as large as the smallest tensor [S, D]; one of twice its element size counts as
        two.
        """
        sizes = dict.fromkeys(self._activations(), DTYPES[self.dtype].itemsize)
        per_token = [name for name in MODULATIONS[self.op] if self._layout(name) == "token"]
        sizes |= dict.fromkeys(per_token, DTYPES[self.modulation_dtype].itemsize)
        unit = min(sizes.values())
        written = 2 if self.op == SRNSS else 1
        return sum(sizes.values()) // unit, written * DTYPES[self.dtype].itemsize // unit, self.rows * self.width * unit

    @property
    def bytes(self) -> int:
        """Bytes that a call has to move: each operand once."""
        operands = self._operands()
        written = 2 if self.op == SRNSS else 1
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in operands.values()]
        return sum(sizes) + written * math.prod(operands["x"][0]) * operands["x"][1].itemsize

    def inputs(self, device: str = "cuda") -> dict[str, Tensor]:
        """Random arguments of one call."""
        made: dict[str, Tensor] = {}
        modulations = MODULATIONS[self.op]
        shared = (
            torch.randn(*self._modulation_rows(self.layout), 6, self.width, dtype=DTYPES[self.modulation_dtype], device=device)
            if self.views
            else None
        )
        for name, (shape, dtype) in self._operands().items():
            if name == "index":
                made[name] = torch.randint(INDEX_ROWS, shape, dtype=dtype, device=device)
            elif shared is not None and name in modulations:
                made[name] = shared[..., modulations.index(name), :]
            else:
                made[name] = torch.randn(shape, dtype=dtype, device=device)
        return made

    def _operands(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor argument."""
        dtype, modulation = DTYPES[self.dtype], DTYPES[self.modulation_dtype]
        every: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        every |= dict.fromkeys(self._activations(), ((1, self.rows, self.width), dtype))
        for name in MODULATIONS[self.op]:
            every[name] = (*self._modulation_rows(self._layout(name)), self.width), modulation
            if self.tables:
                every[f"{name}_table"] = (self.width,), torch.float32
        if self.affine:
            every |= dict.fromkeys(("weight", "bias") if self.norm == "layer" else ("weight",), ((self.width,), dtype))
        if self.layout == "index":
            every["index"] = (self.rows,), torch.int64
        return every

    def _activations(self) -> tuple[str, ...]:
        return ("x",) if self.op == NSS else ("residual", "x")

    def _layout(self, name: str) -> str:
        return self.gate_layout if name == "gate" and self.gate_layout is not None else self.layout

    def _modulation_rows(self, layout: str) -> tuple[int, ...]:
        return {"sample": (1,), "token": (1, self.rows), "frame": (1, self.frames, 1), "index": (INDEX_ROWS,)}[layout]


def _anchors() -> Iterator[Cell]:
    """The sizes of real models (Qwen-Image, Wan, HunyuanVideo) and the smaller ones around them."""
    small = [(128, 1024), (128, 3072), (1024, 1024), (1024, 3072), (4096, 1024), (4096, 3072), (4096, 4096)]
    videos = [(32760, 1536), (27030, 3072), (75600, 5120)]
    latency = [(128, 1024), (1024, 1024)]  # settled by launches, not by what autotuning chooses
    wide = [(4096, 1024), (4096, 3072), (4096, 4096), *videos]
    for op in (NSS, SRNSS):
        for size in small + videos:
            yield Cell(op, *size, group="anchors", autotune=size not in latency)
        for size in [*small, (27030, 3072)]:
            yield Cell(op, *size, "token", group="anchors")
            if op == SRNSS:
                yield Cell(op, *size, "token", "sample", group="anchors")
        for size in wide:
            yield Cell(op, *size, modulation="fp32", group="anchors")
        yield Cell(op, 27030, 3072, "token", modulation="fp32", group="anchors")
    for size in [(128, 3072), (1024, 3072), (4096, 1024), (4096, 3072), *videos]:
        yield Cell(SR, *size, group="anchors")
    yield Cell(SR, 4096, 3072, "token", group="anchors")
    for size in [(4096, 3072), *videos]:
        yield Cell(SR, *size, modulation="fp32", group="anchors")


def _pull_request() -> Iterator[Cell]:
    """The two tables of sglang's pull request 14717: scale and shift per token, gate per sample."""
    for op in (NSS, SRNSS):
        for norm in ("layer", "rms"):
            for affine in (False, True):
                for rows in (128, 1024, 4096):
                    for width in (1024, 3072, 4096):
                        gate = "sample" if op == SRNSS else None
                        yield Cell(op, rows, width, "token", gate, norm=norm, affine=affine, group="pr14717")


def _variants() -> Iterator[Cell]:
    """Everything else that the ops accept and models use."""
    size = (4096, 3072)
    for op in (NSS, SRNSS):
        for dtype in ("fp16", "fp32"):
            yield Cell(op, 1024, 3072, dtype=dtype)
            yield Cell(op, *size, dtype=dtype)
            yield Cell(op, *size, "token", dtype=dtype)
        yield Cell(op, *size, norm="rms")
        yield Cell(op, *size, affine=True)
        yield Cell(op, *size, "index")
        yield Cell(op, 27030, 3072, "index")
        yield Cell(op, *size, "frame", frames=16)
        yield Cell(op, 32760, 1536, "frame", frames=21)
        yield Cell(op, *size, tables=True)
        yield Cell(op, 32760, 1536, tables=True)
        yield Cell(op, 75600, 5120, tables=True)
        yield Cell(op, *size, views=True)
        yield Cell(op, *size, "token", views=True)
        yield Cell(op, 27280, 3072, "token", tables=True, views=True)  # Wan 2.2 TI2V-5B
        for width in (1152, 1920, 2432, 6144):
            yield Cell(op, 4096, width)
        yield Cell(op, 4096, 3071)
    yield Cell(SR, *size, dtype="fp16")
    yield Cell(SR, *size, dtype="fp32")
    yield Cell(SR, *size, "index")
    yield Cell(SR, *size, "frame", frames=16)
    yield Cell(SR, *size, tables=True)
    yield Cell(SR, 27280, 3072, "token", tables=True, views=True)
    for width in (1152, 1920, 2432, 6144, 3071):
        yield Cell(SR, 4096, width)


def all_cells() -> list[Cell]:
    """Every cell once; a cell that two groups name belongs to the first."""
    cells: dict[str, Cell] = {}
    for cell in [*_anchors(), *_pull_request(), *_variants()]:
        cells.setdefault(cell.name, cell)
    return list(cells.values())


def quick_cells() -> list[Cell]:
    """A minute's worth: each op and kind of modulation at a latency-bound, a middle and a large
    size.
    """
    sizes = [(128, 3072), (4096, 3072), (27030, 3072)]
    anchors = [c for c in all_cells() if c.group == "anchors" and (c.rows, c.width) in sizes and c.gate_layout is None]
    variants = [c for c in all_cells() if c.group == "variants" and c.op == NSS and (c.layout in ("index", "frame") or not c.aligned)]
    return anchors + variants
