"""Norms that make their own modulation, shared by many models: diffusers' ``AdaLayerNorm*``
(adaLN-Zero, arXiv:2212.09748).

Shapes: ``x`` [B, S, D], ``emb`` [B, D]; the modulations returned beside the modulated ``x`` are
views [B, D].
"""

from typing import Any

import torch
from torch import Tensor

from ..layers import LayerNormScaleShift
from ..ops.quantization import Wanted
from ..swapping.swapped import untouched
from .block import FusedUnit
from .modulation import Modulating
from .module import FusedModule
from .promotion import modulated


class AdaLayerNormZero(Modulating, FusedUnit):
    """diffusers' ``AdaLayerNormZero``."""

    family = "adaLN"
    names = frozenset({"AdaLayerNormZero"})
    fingerprints = {"forward": frozenset({"432cf64fa05a"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
        law: Wanted | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if not self.intact():
            return super().forward(x, timestep, class_labels, hidden_dtype, emb)  # type: ignore[misc]
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        emb = self.modulation(emb)  # type: ignore[arg-type]  # upstream's default; always given
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
        x = modulated(self.norm, x, scale_msa, shift_msa, law=law)
        return x, gate_msa, shift_mlp, scale_mlp, gate_mlp


class AdaLayerNormZeroSingle(Modulating, FusedUnit):
    """diffusers' ``AdaLayerNormZeroSingle``."""

    family = "adaLN"
    names = frozenset({"AdaLayerNormZeroSingle"})
    fingerprints = {"forward": frozenset({"549caa2570fa"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(self, x: Tensor, emb: Tensor | None = None, law: Wanted | None = None) -> tuple[Tensor, Tensor]:
        if not self.intact():
            return super().forward(x, emb)  # type: ignore[misc]
        emb = self.modulation(emb)  # type: ignore[arg-type]  # upstream's default; always given
        shift_msa, scale_msa, gate_msa = emb.chunk(3, dim=1)
        x = modulated(self.norm, x, scale_msa, shift_msa, law=law)
        return x, gate_msa


class AdaLayerNormContinuous(Modulating, FusedUnit):
    """diffusers' ``AdaLayerNormContinuous``, the output norm of Qwen-Image and HunyuanVideo."""

    family = "adaLN"
    names = frozenset({"AdaLayerNormContinuous"})
    fingerprints = {"forward": frozenset({"325453aa6a0e"})}  # 0.37.0 to 0.42.1
    sites = {"norm": LayerNormScaleShift}

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        if not self.intact():
            return super().forward(x, conditioning_embedding)  # type: ignore[misc]
        emb = self.modulation(conditioning_embedding, x.dtype)
        scale, shift = emb.chunk(2, dim=1)
        return modulated(self.norm, x, scale, shift)


def law_argument(norm: Any, law: Wanted | None) -> dict[str, Wanted]:
    """``law`` as an argument of ``norm``, which may have been replaced by one that takes none, and
    whose results somebody may look at.
    """
    return {"law": law} if law is not None and isinstance(norm, FusedModule) and untouched(norm) else {}
