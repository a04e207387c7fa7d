"""What every tiny model keeps when it is patched."""

import pytest
import torch
from support import model_checks, tiny
from torch import Tensor, nn

from ditnorm.patching import patch_model

HALVES = [torch.bfloat16, torch.float16]
LTX2 = {name for name in tiny.MODELS if name.startswith("ltx2")}  # 16 forward passes of these take long

SUMMED_IN_ANOTHER_ORDER = {
    "qwen-image-2.1",  # rows of modulations of its own for each token, as the next three
    "qwen-image-2.1-edit",
    "wan-ti2v",
    "wan-ti2v-text",
    "sd3.5-controlnet",  # three gradients meet in each stream: of the next block, of the residual and of the ControlNet's Linear
    "sd3.5-controlnet-without-text",
}


@pytest.mark.parametrize("device", model_checks.DEVICES)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_patched_output_is_bit_identical(name: str, dtype: torch.dtype, batch: int, device: str) -> None:
    model_checks.bit_identical(name, dtype, batch, device)


FIRST_OF_CLASS = {tiny.MODELS[name].cls: name for name in reversed(tiny.MODELS)}.values()
# A model's variants know nothing of dtypes: the first is enough in the second one.
QUICK = {torch.bfloat16: {*tiny.MODELS} - LTX2 | {"ltx2", "ltx2.3"}, torch.float16: {*FIRST_OF_CLASS}}
IN_SINGLE = [
    pytest.param(name, dtype, marks=[] if name in QUICK[dtype] else [pytest.mark.slow]) for name in tiny.MODELS for dtype in HALVES
]


@pytest.mark.parametrize("device", model_checks.DEVICES)
@pytest.mark.parametrize(("name", "dtype"), IN_SINGLE)
def test_single_rounding_is_no_less_accurate_than_unpatched(name: str, dtype: torch.dtype, device: str) -> None:
    model_checks.no_less_accurate(name, dtype, device)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_unpatching_restores_the_model(name: str) -> None:
    model_checks.restored(name, torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name not in SUMMED_IN_ANOTHER_ORDER])
def test_gradients_are_those_of_the_unpatched_model(name: str) -> None:
    model_checks.same_gradients(name)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_float32_model_under_autocast_rounds_as_unpatched(name: str) -> None:
    model, arguments = tiny.load(name, torch.float32), tiny.inputs(name, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = tiny.run(model, arguments)
        assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)


@pytest.mark.parametrize("name", [name for name in ("flux", "chroma-masked", "flux2", "qwen-image-2.1-edit") if name in tiny.MODELS])
def test_blocks_compile_to_no_more_graphs_and_fewer_calls_than_unpatched(name: str) -> None:
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 1, torch.bfloat16)
    expected = tiny.run(model, arguments)
    graphs, calls = [], []
    for _ in range(2):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert torch.equal(tiny.run(model, arguments), expected)
        stats = torch._dynamo.utils.counters["stats"]
        graphs.append(stats["unique_graphs"])
        calls.append(stats["calls_captured"])
        for module in model.modules():
            module._compiled_call_impl = None
        patch_model(model, strict=True)
    assert graphs[1] <= graphs[0]  # FLUX.1's last single-stream block is given views
    assert calls[1] < calls[0]


@pytest.mark.parametrize(("name", "last"), [("flux", ("ff_context.net.2", "proj_out")), ("qwen-image", ("img_mlp.net.2", "txt_mlp.net.2"))])
def test_overflow_in_half_precision_is_clipped_as_upstream_does(name: str, last: tuple[str, ...]) -> None:
    model, arguments = tiny.load(name, torch.float16), tiny.inputs(name, 1, torch.float16)
    streams: list[Tensor] = []
    for blocks in (module for module in model.children() if isinstance(module, nn.ModuleList)):
        for block in blocks:
            for linear in (module for path, module in block.named_modules() if path in last):
                linear.weight.data.mul_(3e4)
            block.register_forward_hook(lambda _module, _args, outputs: streams.extend(outputs))
    tiny.run(model, arguments)
    tiny.run(patch_model(model, strict=True), arguments)

    expected, patched = streams[: len(streams) // 2], streams[len(streams) // 2 :]
    assert any((stream.abs() == 65504).any() for stream in expected)
    for ours, theirs in zip(patched, expected, strict=True):
        assert torch.equal(ours.nan_to_num(nan=1.0), theirs.nan_to_num(nan=1.0))
