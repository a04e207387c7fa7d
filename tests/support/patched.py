"""A tiny Wan model for the tests of patching, and what they look at."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.models.transformers import transformer_wan
from torch import Tensor, nn

from ditnorm import kernels
from ditnorm.fused import activation_sites, feed_forward
from ditnorm.ops.options import FLOATS, HALVES
from ditnorm.swapping import generated

from . import tiny

DTYPE = torch.bfloat16


def run(model: nn.Module, name: str = "wan-t2v") -> Tensor:
    return tiny.run(model, tiny.inputs(name, 2, DTYPE))


def forward_calls() -> int:
    """Calls of ops in this process, on any path. Those of gradients are left out: where no kernel
    serves them, they are PyTorch's operations and aren't counted.
    """
    _compare_activations()
    return sum(n for (op, _), n in kernels.counts().items() if "_backward" not in op)


@functools.cache
def _compare_activations() -> None:
    """On a GPU kernels of activations are compared with PyTorch's before the first call in a dtype,
    by calls that count, too.
    """
    if not torch.cuda.is_available():
        return
    for dtype, op, grad in itertools.product(FLOATS, ("gelu", "swiglu"), (False, True)):
        with torch.set_grad_enabled(grad):
            activation_sites.served(op, torch.ones(1, 8, device="cuda", dtype=dtype))
    for dtype in HALVES:
        feed_forward._kernels_gelu_is_atens(torch.ones(1, 8, device="cuda", dtype=dtype))


def fused_calls(call: Callable[[], object]) -> int:
    before = forward_calls()
    call()
    return forward_calls() - before


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def is_patched(model: nn.Module) -> bool:
    return any(generated.origin_of(cls) for cls in classes(model))


def pipeline(transformer: nn.Module, transformer_2: nn.Module | None = None) -> WanPipeline:
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer, transformer_2=transformer_2)


class WanTransformerBlock(transformer_wan.WanTransformerBlock):
    """A version of the block that nobody has looked at."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * 2
