"""Gradients through a patched model: full, LoRA, checkpointed."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import lora
from .feature import DEVICE, Feature, arguments_of, its_output, output_of, unchanged

STEPS = 2


def _forward(model: nn.Module, family: str) -> Tensor:
    """The output where gradients are wanted: HunyuanVideo's single-stream blocks then add both
    residual streams in one fused call.
    """
    return output_of(model, arguments_of(family)).detach()


def _repeatable_attention() -> contextlib.AbstractContextManager[None]:
    """On a GPU the kernels of attention whose gradients don't depend on the order of threads."""
    return sdpa_kernel([SDPBackend.MATH]) if DEVICE == "cuda" else contextlib.nullcontext()


def _gradients(model: nn.Module, family: str) -> Tensor:
    """The output, then the gradient of every parameter that has one."""
    model.zero_grad()
    with _repeatable_attention():
        output = output_of(model, arguments_of(family))
        output.float().square().sum().backward()
    # Weights of precomputed modulations are in host memory, and so are their gradients.
    gradients = [p.grad.to(output.device).float().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat([output.detach().float().flatten(), *gradients])


def _train(model: nn.Module, family: str) -> Tensor:
    """What a copy of the model has for trained parameters after a few steps."""
    trained = copy.deepcopy(model)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for step in range(STEPS):
        with _repeatable_attention():
            output_of(trained, arguments_of(family, seed=step)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().float().flatten() for p in parameters])


def _checkpointing(model: Any, folder: Path) -> nn.Module:
    model.enable_gradient_checkpointing()
    return model.train()


def _lora(model: Any, folder: Path) -> nn.Module:
    model.requires_grad_(False)
    return lora.add(model).train()


def _lora_checkpointing(model: Any, folder: Path) -> nn.Module:
    return _checkpointing(_lora(model, folder), folder)


FEATURES = (
    Feature("gradients of all parameters", unchanged, its_output, run=_forward, run_with=_gradients),
    Feature("gradient checkpointing", _checkpointing, its_output, run_with=_gradients, fused="any"),
    Feature("LoRA training steps", _lora, its_output, run=_forward, run_with=_train, passes=STEPS),
    Feature("LoRA training steps, gradient checkpointing", _lora_checkpointing, its_output, run_with=_train, fused="any"),
)
