"""What only a GPU shows: memory that offloading saves, streams, CUDA graphs, Inductor's graph
mode.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from . import pipelines
from .compiled import REPEATED, graphs, no_less_accurate, regional
from .feature import ORDERS, Feature, Upstream, arguments_of, calls_of, forward, output_of, unchanged, weights_at_rest


def _peak(target: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """Where weights are at rest, and the peak of the memory that a run takes."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, at_rest = weights_at_rest(target, run)
    return output, (at_rest, torch.cuda.max_memory_allocated() - before)


def _no_higher(found: Any, upstream: Any) -> bool:
    return found[0] == upstream[0] and found[1] <= upstream[1]


def _model_offload(pipe: Any, folder: Path) -> Any:
    pipe.enable_model_cpu_offload()
    return pipe


def _sequential_offload(pipe: Any, folder: Path) -> Any:
    pipe.enable_sequential_cpu_offload()
    return pipe


def _group_offload(**how: Any) -> Callable[[nn.Module, Path], nn.Module]:
    def apply(model: nn.Module, folder: Path) -> nn.Module:
        apply_group_offloading(model.cpu(), onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), use_stream=True, **how)
        return model

    return apply


def _captured(model: nn.Module, family: str) -> Tensor:
    """A forward pass captured in a CUDA graph by hand and replayed twice; the second replay's
    output.
    """
    arguments = arguments_of(family)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(**arguments, return_dict=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = output_of(model, arguments)
        for _ in range(2):
            graph.replay()
        return output.clone()


def _marked(model: nn.Module, family: str) -> Tensor:
    """A forward pass as CUDA graph trees want it: without the mark every block is a step of its
    own, and overwrites the one before.
    """
    torch.compiler.cudagraph_mark_step_begin()
    return forward(model, family).clone()


_COPIES = "Cannot copy between CPU and CUDA tensors during CUDA graph capture"

FEATURES = (
    Feature(
        "`enable_model_cpu_offload`, peak memory",
        _model_offload,
        _peak,
        run=pipelines.generate,
        load=pipelines.pipeline,
        agrees=_no_higher,
        fused="any",
        gpus=1,
        note="not above the unpatched pipeline's",
    ),
    Feature(
        "`enable_sequential_cpu_offload`, peak memory",
        _sequential_offload,
        _peak,
        run=pipelines.generate,
        load=pipelines.pipeline,
        agrees=_no_higher,
        fused="any",
        gpus=1,
        note="not above the unpatched pipeline's",
    ),
    Feature(
        "group offloading with a stream, block level",
        _group_offload(offload_type="block_level", num_blocks_per_group=1),
        calls_of(ModuleGroup, "onload_"),
        gpus=1,
    ),
    Feature(
        "group offloading with a stream, leaf level", _group_offload(offload_type="leaf_level"), calls_of(ModuleGroup, "onload_"), gpus=1
    ),
    Feature(
        "a CUDA graph by hand",
        unchanged,
        calls_of(torch.cuda.CUDAGraph, "replay"),
        run_with=_captured,
        fused="any",
        upstream=dict.fromkeys(
            ("Qwen-Image", "LTX-2"), Upstream(_COPIES, "parts of their rotary embeddings are copied from the CPU in every forward pass")
        )
        | {"Lumina2": Upstream(_COPIES, "Lumina 2 reads its text's lengths from the mask, on the CPU")},
        gpus=1,
    ),
    Feature(
        '`compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")`',
        regional(fullgraph=True, mode="reduce-overhead"),
        graphs,
        run_with=_marked,
        bound=no_less_accurate,
        families=REPEATED,
        fused="any",
        agrees=lambda found, upstream: found <= upstream + 1,
        gpus=1,
        slow=frozenset(ORDERS),
        note="with `torch.compiler.cudagraph_mark_step_begin()` before each pass, without which upstream fails; replays aren't counted",
    ),
)
