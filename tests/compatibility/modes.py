"""Ways of running: inference mode, autocast, threads."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .feature import DEVICE, DTYPE, Feature, Upstream, forward, its_output, load, unchanged
from .offload import blocks_of

THREADS = 4


def _inference_mode(model: nn.Module, family: str) -> Tensor:
    with torch.inference_mode():
        return forward(model, family)


def _is_inference(target: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    output = run()
    return output, output.is_inference()


def _autocast(to: torch.dtype, dtype: torch.dtype = DTYPE) -> Callable[[nn.Module, str], Tensor]:
    def run(model: nn.Module, family: str) -> Tensor:
        with torch.autocast(DEVICE, dtype=to):
            return forward(model, family, dtype=dtype)

    return run


def _autocast_dtype(target: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """What blocks run under. Hooks for all modules would be shown the norms, which aren't fused
    then.
    """
    seen = set()

    def look(module: nn.Module, args: Any) -> None:
        seen.add(torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None)

    handles = [block.register_forward_pre_hook(look) for block in blocks_of(target)]
    try:
        return run(), seen
    finally:
        for handle in handles:
            handle.remove()


def _threads(model: nn.Module, family: str) -> Tensor:
    """Several generations at once, each with its own inputs."""
    with ThreadPoolExecutor(THREADS) as pool:
        return torch.stack(list(pool.map(lambda seed: forward(model, family, seed=seed), range(THREADS))))


FEATURES = (
    Feature("`torch.inference_mode`", unchanged, _is_inference, run_with=_inference_mode),
    Feature("autocast to bf16 around a bf16 model", unchanged, _autocast_dtype, run_with=_autocast(torch.bfloat16)),
    Feature(
        "autocast to fp16 around a bf16 model",
        unchanged,
        _autocast_dtype,
        run_with=_autocast(torch.float16),
        upstream={
            **dict.fromkeys(
                ("Qwen-Image", "Z-Image", "SD3"),
                Upstream("prioritize", "PyTorch's autocast on the CPU doesn't take both kinds of half precision", "cpu"),
            ),
            "HunyuanVideo": Upstream("mixed dtype", "PyTorch's layer norm on the CPU doesn't take fp16 with bf16 weights", "cpu"),
        },
    ),
    Feature(
        "autocast to bf16 around a model in fp32",
        unchanged,
        _autocast_dtype,
        run=functools.partial(forward, dtype=torch.float32),
        run_with=_autocast(torch.bfloat16, torch.float32),
        load=functools.partial(load, dtype=torch.float32),
    ),
    Feature("threads that generate at once", unchanged, its_output, run_with=_threads, passes=THREADS),
)
