"""What is trained: a LoRA or all weights, with and without gradient checkpointing; which models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import Tensor

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

MODELS: Mapping[str, Mapping[str, int]] = {
    "qwen-image": {"num_layers": 8},
    "wan2.1-1.3b": {"num_layers": 6},
    "hunyuan-video-480p": {"num_layers": 2, "num_single_layers": 4},
    "flux.1-dev": {"num_layers": 4, "num_single_layers": 8},
    "flux.2-klein-4b": {"num_layers": 3, "num_single_layers": 9},
    "z-image-turbo": {"n_layers": 8, "n_refiner_layers": 1},
}
"""Names of the catalogue, and so many layers that training all weights fits an 80 GB GPU."""
WITHOUT_CUDNN = frozenset({"flux.1-dev"})
"""cuDNN's attention ends the backward pass of these with an illegal memory access, in the unpatched
model, too (PyTorch 2.11.0, H200). They are trained with PyTorch's other attention kernels.
"""


@dataclass(frozen=True)
class Plan:
    """One way to train a model."""

    name: str
    lora: bool
    checkpointing: bool

    def prepare(self, model: Any) -> list[Tensor]:
        """Makes a frozen model trainable; returns what is trained."""
        if self.lora:
            model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
        else:
            model.requires_grad_(True)
        if self.checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        return [p for p in model.parameters() if p.requires_grad]


PLANS = tuple(
    Plan(f"{what}, checkpointing" if checkpointing else what, what == "LoRA", checkpointing)
    for what in ("LoRA", "all weights")
    for checkpointing in (False, True)
)
