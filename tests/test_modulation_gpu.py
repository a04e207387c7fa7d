"""Precomputed modulations where there is a device beside the host: where weights are, streams,
graphs, memory.
"""

import copy
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from support import model_checks, tiny
from torch import Tensor, nn

import ditnorm
from ditnorm.patching.restoring import tables

pytestmark = pytest.mark.gpu

NAMES = [
    "qwen-image",
    "qwen-image-edit-zero-cond-t",
    "hunyuan-video",
    "hunyuan-video-token-replace",
    "hunyuan-video-1.5",
    "hunyuan-image",
    "sd3.5-medium",
    "flux",
]


def loaded(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return tiny.load(name, torch.bfloat16).cuda(), model_checks.moved(tiny.inputs(name, 2, torch.bfloat16), "cuda")


def modulation_weights(model: nn.Module) -> list[nn.Parameter]:
    (table,) = tables(model)
    return [p for _, module, _ in table.modules for p in module.modulation_weights()]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_pinned_in_host_memory_and_come_back_to_where_the_model_is(name: str) -> None:
    model, arguments = loaded(name)
    expected = tiny.run(model, arguments)
    ditnorm.precompute_modulation(model)
    for move in (lambda: model, lambda: model.to("cuda"), lambda: model.cpu().cuda()):
        move()
        assert torch.equal(tiny.run(model, arguments), expected)
        assert torch.equal(tiny.run(model, arguments), expected)
        assert all(p.device.type == "cpu" and p.is_pinned() for p in modulation_weights(model))
    assert all(t.device.type == "cpu" for key, t in model.state_dict().items() if "mod.1" in key or "norm1.linear" in key)
    model.half()
    reference = tiny.load(name, torch.bfloat16).cuda().half()
    half = model_checks.moved(arguments, torch.float16)
    assert torch.equal(tiny.run(model, half), tiny.run(reference, half))
    ditnorm.restore_modulation(model)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert torch.equal(tiny.run(model, half), tiny.run(reference, half))


def test_gradients_go_through_weights_in_host_memory() -> None:
    model, arguments = loaded("qwen-image")
    twin = ditnorm.precompute_modulation(copy.deepcopy(ditnorm.patch_model(model)))
    for m in (model, twin):
        m(**arguments, return_dict=False)[0].float().square().sum().backward()
    name = "transformer_blocks.0.img_mod.1.weight"
    assert torch.equal(twin.get_parameter(name).grad.cuda(), model.get_parameter(name).grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video", "hunyuan-video-token-replace"])
def test_a_graph_reads_rows_and_what_has_none_becomes_nan(name: str) -> None:
    model, arguments = loaded(name)
    arguments.pop("encoder_hidden_states_mask", None)  # of which diffusers' Qwen-Image copies a length from the CPU, patched or not
    given = [arguments | {"timestep": arguments["timestep"] * scale} for scale in (1.0, 0.5)]
    expected = [tiny.run(model, each) for each in given]
    ditnorm.precompute_modulation(model)
    for each in given:
        tiny.run(model, each)
    static = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given[0].items()}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = model(**static, return_dict=False)[0]
    for each, wanted in zip(given, expected, strict=True):
        static["timestep"].copy_(each["timestep"])
        graph.replay()
        assert torch.equal(output, wanted)
    static["timestep"].copy_(given[0]["timestep"] * 0.37)
    graph.replay()
    assert output.isnan().all()


def test_a_graph_of_changed_weights_or_of_weights_in_host_memory_says_so() -> None:
    model, arguments = loaded("hunyuan-video")
    ditnorm.precompute_modulation(model)
    tiny.run(model, arguments)
    static, first = ({k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()} for _ in range(2))
    with torch.enable_grad():
        model(**first, return_dict=False)  # what ops try once, they have tried before the capture
    with pytest.raises(RuntimeError, match="which are in host memory"), torch.enable_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(**static, return_dict=False)
    with torch.no_grad():
        modulation_weights(model)[0].mul_(2)
    with pytest.raises(RuntimeError, match="run the model once"), torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(**static, return_dict=False)
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(ditnorm.restore_modulation(model), arguments), expected)


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video"])
def test_compiled_as_a_whole_and_block_by_block(name: str) -> None:
    model, arguments = loaded(name)
    ditnorm.precompute_modulation(model)
    expected = tiny.run(model, arguments)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")  # type: ignore[operator]
    assert torch.equal(tiny.run(model, arguments), expected)
    whole = torch.compile(loaded(name)[0], backend="aot_eager")
    ditnorm.precompute_modulation(whole)
    for scale in (1.0, 0.5):
        given = arguments | {"timestep": arguments["timestep"] * scale}
        assert torch.equal(tiny.run(whole, given), tiny.run(model, given))


def test_making_a_table_takes_the_memory_of_two_modules() -> None:
    torch.manual_seed(0)
    config = tiny.MODELS["qwen-image"].config | {
        "attention_head_dim": 128,
        "num_attention_heads": 8,
        "num_layers": 12,
        "axes_dims_rope": (16, 56, 56),
    }

    with torch.device("cuda"):
        model = QwenImageTransformer2DModel(**config).bfloat16().eval().requires_grad_(False)
    arguments = model_checks.moved(tiny.inputs("qwen-image", 1, torch.bfloat16), "cuda")
    expected = [tiny.run(model, arguments | {"timestep": t}) for t in torch.tensor([[0.9], [0.5]], device="cuda", dtype=torch.bfloat16)]
    before = torch.cuda.memory_allocated()
    ditnorm.precompute_modulation(model, timesteps=torch.tensor([900.0, 500.0]))
    (table,) = tables(model)
    largest = max(sum(p.nbytes for p in module.modulation_weights()) for _, module, _ in table.modules)
    assert before - torch.cuda.memory_allocated() > 0.9 * (table.host_bytes - table.nbytes)
    at_rest = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for t, wanted in zip(torch.tensor([[0.9], [0.5]], device="cuda", dtype=torch.bfloat16), expected, strict=True):
        assert torch.equal(tiny.run(model, arguments | {"timestep": t}), wanted)
    assert (table.schedules, table.misses) == (1, 0)
    assert torch.cuda.max_memory_allocated() - at_rest < 2.5 * largest
