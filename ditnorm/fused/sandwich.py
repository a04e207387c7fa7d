"""Blocks that norm what attention and MLP return before they add it to the stream, with diffusers'
``RMSNorm`` (sandwich norm): the branch's norm, the sum and the next norm are one kernel.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..swapping.swapped import untouched
from .block import FusedBlock
from .module import FusedModule
from .norms import dtype_of, norm_call, weight_of
from .promotion import promoted
from .sites import BATCH, TOKENS, FusedCall, as_expression, random_numbers


@dataclass(frozen=True)
class SandwichSite:
    """The norm of a branch, its sum with the stream and, where ``weight`` is one, the norm behind
    it. ``x_weight``, ``weight``: dtypes, None where there is none.
    """

    op: str
    width: int
    dtype: torch.dtype
    eps: float
    x_weight: torch.dtype | None
    weight: torch.dtype | None
    quantised: None = None

    def __str__(self) -> str:
        return f"{self.op} ({self.dtype}, width {self.width})".replace("torch.", "")

    @property
    def fused(self) -> bool:
        return {self.x_weight, self.weight} <= {None, self.dtype}

    def same_bits(self, device: torch.device) -> bool:
        """Each row has its own scale; they are modulated by views of one tensor, and not at all."""
        random = random_numbers(device)

        def rows() -> Tensor:
            return (random(BATCH, TOKENS, self.width) * random(BATCH, TOKENS, 1).exp()).to(self.dtype)

        def vector(dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else (1 + 0.3 * random(self.width)).to(dtype)

        scale, gate = random(BATCH, 1, 2 * self.width).to(self.dtype).chunk(2, dim=-1)
        given: dict[str, Any] = {"residual": rows(), "x": rows(), "x_weight": vector(self.x_weight), "gate": gate, "index": None}
        given |= {"eps": self.eps, "rounding": "eager"}
        if self.op == "norm_scale_residual_norm_scale_shift":
            given |= {"scale": scale, "shift": None, "weight": vector(self.weight)}
        return all(as_expression(self.op, given | changes) for changes in ({}, dict.fromkeys(given.keys() & {"gate", "scale"})))


class SandwichBlock(FusedBlock):
    """A block with such norms."""

    branches: ClassVar[Mapping[str, str | None]]
    """The norm of each branch -> that of the stream behind it, if it stands in the same block."""

    @classmethod
    def calls(cls, module: nn.Module, dtype: torch.dtype) -> Iterator[FusedCall]:
        inlined = {*cls.branches, *cls.branches.values()}
        width = cls.width(module)
        for part in cls.parts(module):
            if part.body is not None and not issubclass(part.body, FusedModule) and part.path not in inlined:
                yield norm_call(part.body, part.module, width, dtype, None, part.path not in cls.unmodulated)
        for branch, norm in cls.branches.items():
            x_norm: Any = getattr(module, branch)
            weight = None if norm is None else dtype_of(getattr(module, norm).weight)
            op = "norm_scale_residual" if norm is None else "norm_scale_residual_norm_scale_shift"
            yield SandwichSite(op, width, dtype, x_norm.eps, dtype_of(x_norm.weight), weight)

    def add(self, branch: str, residual: Tensor, x: Tensor, gate: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """``r = residual + gate * norm(x)``, the norm being that of ``branch``."""
        x_norm = self._modules[branch]
        if _inlinable(x_norm):
            return functional.norm_scale_residual(residual, x, weight_of(x_norm), gate, index=index, eps=x_norm.eps, rounding=self.rounding)
        residual = residual if gate is None else promoted(residual, gate, self.rounding)
        return functional.scale_residual(residual, x_norm(x), gate, index=index, rounding=self.rounding)

    def add_and_norm(
        self,
        branch: str,
        residual: Tensor,
        x: Tensor,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(y, r)``: the same, and ``y = norm(r) * (1 + scale)`` of the norm behind ``branch``."""
        x_norm, norm = self._modules[branch], self._modules[self.branches[branch]]  # type: ignore[index]
        if _inlinable(x_norm) and _inlinable(norm) and x_norm.eps == norm.eps:
            return functional.norm_scale_residual_norm_scale_shift(
                residual, x, weight_of(x_norm), gate, scale, weight=weight_of(norm), index=index, eps=norm.eps, rounding=self.rounding
            )
        return norm(residual, x_norm(x), gate=gate, scale=scale, index=index)


def _inlinable(norm: Any) -> bool:
    """Whether a norm may be computed with what stands around it: nobody wants to see it alone."""
    return norm.bias is None and untouched(norm)
