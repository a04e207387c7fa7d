"""One rank of the tests in ``test_parallel``: a model sharded over two processes, patched in every
order, against the unpatched one, and against the model on one device.
"""

import json
import math
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from support import tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ditnorm import patch_model, unpatch_model

from .feature import DTYPE
from .matrix import fused_calls, is_patched
from .offload import blocks_of

WORLD = 2
HEADS = {"num_attention_heads": 4}
WIDER = {"attention_head_dim": 16}  # cuDNN's attention takes multiples of 8
Parallelise = Callable[[Any, str], Any]


def _on_the_cpu_too() -> None:
    """Diffusers counts accelerators and lists the devices that it has tried; with gloo the CPU
    computes the same.
    """
    if not torch.accelerator.is_available():
        torch.accelerator.device_count = lambda: WORLD
        tensor_parallel._SUPPORTED_TP_DEVICES = (*tensor_parallel._SUPPORTED_TP_DEVICES, "cpu")


def _ulysses(model: Any, device: str) -> Any:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))
    return model


def _ulysses_uneven(model: Any, device: str) -> Any:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD, ulysses_anything=True))
    return model


def _ring(model: Any, device: str) -> Any:
    model.set_attention_backend("_native_cudnn")  # one of those that return log-sum-exps
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)  # the call above also changes the whole process
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=WORLD))
    return model


def _tensor_parallel(model: Any, device: str) -> Any:
    model.enable_parallelism(config=TensorParallelConfig(mesh=init_device_mesh(device, (WORLD,))))
    return model


def _fsdp2(model: Any, device: str) -> Any:
    mesh = init_device_mesh(device, (WORLD,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _ddp(model: Any, device: str) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)  # nothing reads what Qwen-Image's last block makes of the text


KINDS: dict[str, Parallelise] = {
    "Ulysses": _ulysses,
    "Ulysses, uneven shards": _ulysses_uneven,
    "ring": _ring,
    "tensor parallel": _tensor_parallel,
    "FSDP2": _fsdp2,
    "DistributedDataParallel": _ddp,
}
CASES: dict[str, dict[str, str]] = {
    "Ulysses": {"Qwen-Image": "qwen-image", "Wan": "wan-t2v", "Wan, per token": "wan-ti2v", "Wan, one timestep": "wan-ti2v-text"},
    "Ulysses, uneven shards": {"Qwen-Image": "qwen-image", "Wan": "wan-t2v"},
    "ring": {"Qwen-Image": "qwen-image", "Wan": "wan-t2v", "Wan, per token": "wan-ti2v"},
    "tensor parallel": {"Qwen-Image": "qwen-image"},
    "FSDP2": {"Qwen-Image": "qwen-image", "Wan": "wan-t2v", "HunyuanVideo": "hunyuan-video", "SD3": "sd3.5-medium"},
    "DistributedDataParallel": {"Qwen-Image": "qwen-image", "Wan": "wan-t2v", "HunyuanVideo": "hunyuan-video", "SD3": "sd3.5-medium"},
}
"""Kind -> family -> model: those that diffusers has a plan for."""

REMARKS = {
    "Ulysses, uneven shards": "`ulysses_anything=True`, text of 7 tokens",
    "ring": "GPUs only: diffusers has no ring attention for the CPU",
    "tensor parallel": "diffusers has a plan for Qwen-Image only",
    "FSDP2": "`fully_shard` after patching; blocks that are sharded already are left alone with a warning",
    "DistributedDataParallel": "output and gradients; around the patched model, what is inside already is left alone with a warning",
}


LEFT_ALONE = {"FSDP2": "FSDP", "DistributedDataParallel": "it is inside DistributedDataParallel"}
"""Kind -> what patching warns of where the model is parallel already."""


def load(name: str, device: str) -> Any:
    """The tiny model with a number of heads that two ranks can share."""
    model = tiny.MODELS[name]
    torch.manual_seed(0)
    config = model.config | HEADS | (WIDER if name.startswith("wan") else {})
    if "caption_projection_dim" in config:  # the model's width
        config["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    made = getattr(diffusers, model.cls)(**config)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made.to(device, DTYPE).eval()


def inputs(name: str, device: str, kind: str) -> dict[str, Any]:
    arguments = tiny.inputs(name, 2, DTYPE, seed=dist.get_rank() if kind == "DistributedDataParallel" else 0)
    if "img_shapes" in arguments and "uneven" not in kind:  # the text too is sharded
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :6]
        # A rank of a ring sees a share of the keys, which no mask over all of them fits.
        arguments["encoder_hidden_states_mask"] = None if kind == "ring" else torch.ones(2, 6, dtype=torch.long)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def observe(model: nn.Module, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
    """The output, with the number of tokens that each projection of queries sees and how many
    parameters are sharded.
    """
    tokens: list[int] = []
    query = next(m for name, m in model.named_modules() if name.endswith("to_q"))
    handle = query.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[1]))
    output = tiny.run(model, arguments)
    handle.remove()
    return output, (tokens, sum(isinstance(p, DTensor) for p in model.parameters()))


def observe_training(model: nn.Module, arguments: dict[str, Any]) -> tuple[Tensor, Any]:
    """The output, with the gradients, which data parallelism averages."""
    output = model(**arguments, return_dict=False)[0]
    output.float().square().mean().backward()
    gradients = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return output.detach(), torch.cat(gradients).numpy().tobytes()


def gradients_of(model: nn.Module, arguments: dict[str, Any]) -> dict[str, bytes]:
    """Of the whole parameters, whichever rank has which part."""
    model.requires_grad_(True)
    tiny.joined(model(**arguments, return_dict=False)).float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    whole = {name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for name, gradient in gradients.items()}
    return {name: gradient.float().cpu().numpy().tobytes() for name, gradient in whole.items()}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def no_less_accurate(sharded: Tensor, single: Tensor, exact: Tensor) -> None:
    """As near to a float32 run of the same weights as the model on one device is.

    Where each rank computes a part of a sum (tensor parallelism, ring attention), the parts are
    rounded besides the sum. Of independent parts the squares add up to the sum's, so their rounding
    doubles the variance of the error there, and nowhere is more rounded. The ratio of two such
    errors, estimated from N values that err independently, has a standard deviation of 1 / sqrt(N):
    four are allowed.
    """
    errors = [(output.float() - exact).square().mean().sqrt() for output in (sharded, single)]
    assert errors[0] <= errors[1] * math.sqrt(2) * (1 + 4 / math.sqrt(exact.numel())), f"errors on two ranks and on one: {errors}"


def check(kind: str, name: str, order: str, device: str) -> None:
    """One case on this rank; raises where the patched model differs."""
    look = observe_training if kind == "DistributedDataParallel" else observe
    arguments = inputs(name, device, kind)
    plain = load(name, device)
    plainly = look(plain, arguments)
    patch_model(plain)  # not counted: on a GPU it verifies the kernels first
    every_call = fused_calls(lambda: look(plain, arguments))[0]
    exact = tiny.run(unpatch_model(plain).float(), {k: _widened(v) for k, v in arguments.items()})
    upstream, model = load(name, device), load(name, device)
    upstream = KINDS[kind](upstream, device.split(":")[0])
    expected, observed = look(upstream, arguments)
    assert observed != plainly[1], "the model isn't parallel"

    if order == "patch before":
        patch_model(model, strict=True)
    model = KINDS[kind](model, device.split(":")[0])
    if order == "patch after" and kind in LEFT_ALONE:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch_model(model)
        assert any(LEFT_ALONE[kind] in str(w.message) for w in caught)
        every_call = fused_calls(lambda: look(model, arguments))[0]
    elif order == "patch after":
        patch_model(model, strict=True)
    calls, actual = fused_calls(lambda: look(model, arguments))
    assert torch.equal(actual[0], expected), f"differs by {(actual[0] - expected).abs().max()}"
    assert actual[1] == observed
    no_less_accurate(actual[0], plainly[0], exact)
    assert calls == every_call

    if kind == "FSDP2":
        assert gradients_of(model, arguments) == gradients_of(upstream, arguments)
        return  # unpatching refuses: the classes are FSDP's
    unpatch_model(model)
    assert not is_patched(model)
    assert torch.equal(look(model, arguments)[0], expected)


def rank(index: int, backend: str, kind: str, folder: str) -> None:
    """Runs all cases of a kind and leaves the traceback of what went wrong, by case, in a file."""
    torch.set_num_threads(1)
    _on_the_cpu_too()
    device = "cpu" if backend == "gloo" else f"cuda:{index}"
    if backend == "nccl":
        torch.cuda.set_device(index)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=index, world_size=WORLD)
    failures = {}
    for family, name in CASES[kind].items():
        for order in ("patch before", "patch after"):
            try:
                check(kind, name, order, device)
            except Exception:
                failures[f"{family}, {order}"] = traceback.format_exc()
    Path(folder, f"{index}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()
