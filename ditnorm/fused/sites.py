"""The fused calls of a model's norms: what the bits of each depend on, and its comparison with the
unfused expression.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import functional
from ..ops.bits import same_bits
from ..ops.options import RMS_EPS
from ..ops.table import OPS

# A wrong order of reduction changes about 1 % of the rows of a bf16 LayerNorm, so 4096 rows miss it
# with probability 0.99 ** 4096.
BATCH, TOKENS = 4, 1024


class FusedCall(Protocol):
    """One call of an op of ours in the forward of a fused module. Equal calls have equal bits."""

    @property
    def op(self) -> str:
        """Its name in :mod:`ditnorm.functional`."""

    @property
    def quantised(self) -> str | None:
        """How activations are quantised, of a matrix product of quantised operands; None of all
        other calls.
        """

    @property
    def fused(self) -> bool:
        """False where no kernel takes its dtypes: then the unfused expression runs, and there is
        nothing to compare.
        """

    def same_bits(self, device: torch.device) -> bool:
        """Whether the call gives the bits of the unfused expression, on random rows on
        ``device``.
        """


@dataclass(frozen=True)
class Site:
    """A norm with its modulation, a residual, or both. ``weight``, ``bias`` and ``table`` are
    dtypes, None where there is none.
    """

    op: str
    width: int
    dtype: torch.dtype
    norm: str = "layer"
    eps: float | None = None
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    table: torch.dtype | None = None
    modulated: bool = True
    quantised: None = None

    def __str__(self) -> str:
        details = [str(self.dtype), f"width {self.width}"]
        details += [f"{name} {dtype}" for name in ("weight", "bias", "table") if (dtype := getattr(self, name)) is not None]
        return f"{self.op} ({', '.join(details)})".replace("torch.", "")

    @property
    def fused(self) -> bool:
        return self.norm != "diffusers_rms" or self.weight in (None, self.dtype)

    def same_bits(self, device: torch.device) -> bool:
        """Each row has its own mean and scale; they are modulated by views of one tensor as in a
        block, with a gate and without.
        """
        random = random_numbers(device)

        def rows() -> Tensor:
            spread, mean = random(BATCH, TOKENS, 1).exp(), 4 * random(BATCH, TOKENS, 1)
            return (random(BATCH, TOKENS, self.width) * spread + mean).to(self.dtype)

        def vector(dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else random(self.width).to(dtype)

        scale, shift, gate = random(BATCH, 1, 3 * self.width).to(self.dtype).chunk(3, dim=-1)
        arguments: dict[str, Any] = {"x": rows(), "index": None, "rounding": "eager"}
        if self.op != "scale_residual":
            eps = RMS_EPS if self.eps is None else self.eps
            arguments |= {"weight": vector(self.weight), "bias": vector(self.bias), "norm": self.norm, "eps": eps}
            arguments |= dict.fromkeys(("scale", "shift", "scale_table", "shift_table"))
            if self.modulated:
                arguments |= {"scale": scale, "shift": shift, "scale_table": vector(self.table), "shift_table": vector(self.table)}
        if self.op == "norm_scale_shift":
            return as_expression(self.op, arguments)
        arguments["residual"] = rows()
        gates = ({"gate": gate, "gate_table": vector(self.table)}, {"gate": None, "gate_table": None})
        return all(as_expression(self.op, arguments | gated) for gated in gates)


def random_numbers(device: torch.device) -> Callable[..., Tensor]:
    """A function of a shape: normal numbers in float32, the same in every process."""
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float32)


def as_expression(op: str, arguments: dict[str, Any]) -> bool:
    """Whether an op of :mod:`ditnorm.functional` gives the bits of the unfused expression."""
    return same_bits(getattr(functional, op)(**arguments), OPS[op].expression(**arguments))
