"""Models with quantised weights: patched they keep the bits of torchao's own, and quantise what
several layers read once.
"""

import copy
import io
import warnings
from typing import Any

import peft
import pytest
import torch
from support import quantised, tiny
from support.quantised import LAWS
from torch import Tensor, nn

from ditnorm import kernels, patch_model, report, unpatch_model
from ditnorm.fused import activation
from ditnorm.fused.bfl_linear import BFLOperand
from ditnorm.fused.quantized_linear import QuantizedLinear
from ditnorm.ops.quantization import FLOAT8_ROW, FLOAT8_ROW_BFL, FLOAT8_TENSOR, INT8_ROW, Law

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DTYPE = torch.bfloat16
NAMES = ("wan-t2v", "wan-vace", "qwen-image", "flux", "chroma", "flux2")
NAMES += ("hunyuan-video", "hunyuan-video-token-replace", "hunyuan-video-1.5")


def in_blocks(name: str) -> bool:
    return ("blocks." in name or name.startswith("layers.")) and "refiner" not in name and "controlnet_" not in name


def model_of(name: str, law: Law) -> nn.Module:
    return quantised.quantise(tiny.load(name, DTYPE), law, in_blocks)


def run(model: nn.Module, name: str) -> Tensor:
    return tiny.run(model, tiny.inputs(name, 2, DTYPE))


def calls_of(model: nn.Module, name: str) -> dict[str, int]:
    before = kernels.counts()
    run(model, name)
    found: dict[str, int] = {}
    for (op, path), n in kernels.counts().items():
        found[op] = found.get(op, 0) + n - before[op, path]
    return found


def fused_linears(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


def same(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, NaN included: a row of zeros, as of masked text, has no float8 values."""
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_patched_model_has_the_bits_of_torchao(name: str, law: Law) -> None:
    model = model_of(name, law)
    expected = run(model, name)
    patch_model(model)
    assert same(run(model, name), expected)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(fused_linears(model)) == {path for path, m in linears.items() if type(m.weight).__module__.startswith("torchao")}
    assert f"quantised     {law}: {len(fused_linears(model))} linear layers" in str(report(model))
    unpatch_model(model)
    assert not fused_linears(model)
    assert same(run(model, name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_activation_is_quantised_by_torchao(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(model_of(name, FLOAT8_ROW))
    from torchao.quantization import Float8Tensor

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torchao quantised an activation")

    monkeypatch.setattr(Float8Tensor, "from_hp", refuse)
    run(model, name)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image"])
def test_layers_of_black_forest_labs_are_fused_as_torchaos(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised.quantise_bfl(tiny.load(name, DTYPE), in_blocks)
    expected = run(model, name)
    patch_model(model)
    linears = len(fused_linears(model))
    assert f"quantised     float8-row-bfl: {linears} linear layers" in str(report(model))
    assert same(run(model, name), expected)  # on the CPU diffusers multiplies by what the weights stand for
    assert calls_of(model, name)["quantize"] == 0
    if quantised.cpu_multiplies_float8_rows():
        twin = patch_model(model_of(name, FLOAT8_ROW))
        monkeypatch.setattr(BFLOperand, "takes", lambda self, shape, dtype, bias: True)
        run(model, name), run(twin, name)
        assert len(fused_linears(twin)) == linears
        assert calls_of(model, name) == calls_of(twin, name)
    unpatch_model(model)
    assert not fused_linears(model)


def test_the_report_names_what_is_fused_and_what_isnt_and_why() -> None:
    model = tiny.load("qwen-image", DTYPE)
    quantised.quantise(model, FLOAT8_ROW, lambda name: "blocks.0" in name)
    bounded = next(m for name, m in model.named_modules() if name.endswith("blocks.0.attn.to_q"))
    bounded.weight = nn.Parameter(quantised.weight(torch.randn(bounded.weight.shape, dtype=DTYPE), FLOAT8_ROW, hp_value_ub=3.0), False)  # type: ignore[arg-type]
    expected = run(model, "qwen-image")
    patch_model(model)
    assert same(run(model, "qwen-image"), expected)
    text = str(report(model))
    assert f"quantised     float8-row: {len(fused_linears(model))} linear layers" in text
    assert "quantised linear layers transformer_blocks.0.attn.to_q: activations have bounds" in " ".join(text.split())
    assert "bit-identical: verified" in text


def test_strict_patching_leaves_unknown_quantisers_to_torchao() -> None:
    model = tiny.load("wan-t2v", DTYPE)
    linear: nn.Linear = model.get_submodule("blocks.0.attn1.to_q")  # type: ignore[assignment]
    linear.weight = nn.Parameter(quantised.weight(linear.weight, FLOAT8_ROW, hp_value_ub=3.0), requires_grad=False)
    expected = run(model, "wan-t2v")
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn1\.to_q not fused: activations have bounds"):
        patch_model(model, strict=True)
    assert same(run(model, "wan-t2v"), expected)


def test_nobody_is_told_of_weights_that_leave_activations_alone() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny.load("wan-t2v", DTYPE)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    expected = run(model, "wan-t2v")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        patch_model(model, strict=True)
    assert not fused_linears(model)
    assert same(run(model, "wan-t2v"), expected)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_weights_quantised_after_patching_are_fused_by_patching_again(law: Law) -> None:
    model = patch_model(tiny.load("wan-t2v", DTYPE))
    twin = model_of("wan-t2v", law)
    quantised.quantise(model, law, in_blocks)
    expected = run(twin, "wan-t2v")
    assert same(run(model, "wan-t2v"), expected)  # torchao serves them
    assert not fused_linears(model)
    patch_model(model)
    assert fused_linears(model)
    assert same(run(model, "wan-t2v"), expected)


def test_some_layers_may_stay_as_they_are() -> None:
    for kept in ("to_k", "ffn.net.2", "ffn.net.0.proj", "attn1"):
        model = quantised.quantise(tiny.load("wan-t2v", DTYPE), FLOAT8_ROW, lambda name, kept=kept: in_blocks(name) and kept not in name)  # type: ignore[misc]
        expected = run(model, "wan-t2v")
        assert same(run(patch_model(model), "wan-t2v"), expected), kept


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_copies_saves_and_moves_keep_it(law: Law) -> None:
    model = model_of("wan-t2v", law)
    expected = run(model, "wan-t2v")
    patch_model(model)
    assert same(run(copy.deepcopy(model), "wan-t2v"), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert fused_linears(loaded)
    assert same(run(loaded, "wan-t2v"), expected)
    other = patch_model(model_of("wan-t2v", law))
    other.load_state_dict(model.state_dict(), assign=True)
    assert same(run(other.to("cpu"), "wan-t2v"), expected)


def test_a_users_hook_sees_the_activation() -> None:
    model = model_of("wan-t2v", FLOAT8_ROW)
    expected = run(model, "wan-t2v")
    patch_model(model)
    seen: list[Any] = []
    for path in ("blocks.0.attn1", "blocks.1.attn1.to_q", "blocks.1.ffn", "blocks.2.ffn.net.0", "blocks.2.ffn.net.2", "blocks.2.norm1"):
        model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert same(run(model, "wan-t2v"), expected)
    assert len(seen) >= 6
    assert all(type(x) is Tensor for x in seen)


def test_a_users_hook_sees_what_a_module_returns() -> None:
    model = model_of("hunyuan-video", FLOAT8_ROW)
    expected = run(model, "hunyuan-video")
    patch_model(model)
    seen: list[Any] = []
    for path in (
        "transformer_blocks.0.norm1",
        "single_transformer_blocks.0.norm",
        "transformer_blocks.1.norm2",
        "transformer_blocks.1.attn",
    ):
        model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    assert same(run(model, "hunyuan-video"), expected)
    assert len(seen) == 4
    assert all(type(x) is Tensor for output in seen for x in (output if isinstance(output, tuple) else (output,)))


def test_adapters_are_given_the_activation() -> None:
    name = "qwen-image"
    model = model_of(name, FLOAT8_ROW)
    patched = patch_model(copy.deepcopy(model))
    for m in (model, patched):
        torch.manual_seed(1)
        m.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False))  # type: ignore[operator]
    assert same(run(patched, name), run(model, name))
    assert same(run(patch_model(model), name), run(patched, name))


@pytest.mark.parametrize("name", ["qwen-image", "wan-t2v", "flux", "hunyuan-video", "sd3.5-medium"])
def test_an_adapter_reads_the_activation_beside_what_it_is_quantised_to(name: str) -> None:
    """Which is made with it, once for all that read it."""
    model = model_of(name, FLOAT8_ROW)
    patched = patch_model(copy.deepcopy(model))
    run(patched, name)  # in which GELU's kernel is compared, once a process
    without = calls_of(patched, name)
    for m in (model, patched):
        torch.manual_seed(1)
        m.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "net.0.proj", "proj_mlp"], init_lora_weights=False))  # type: ignore[operator]
    found = calls_of(patched, name)
    beside = {op: n for op, n in found.items() if op.endswith("_and_quantize") and n > 0}
    assert beside
    assert sum(found[op] for op in found if op.endswith("quantize")) == sum(without[op] for op in without if op.endswith("quantize"))
    assert same(run(patched, name), run(model, name))
    with torch.inference_mode():
        assert same(run(patched, name), run(model, name))
    text = " ".join(str(report(patched)).split())
    assert f"adapters on {sum(m.__class__.__name__ == 'TorchaoLoraLinear' for m in patched.modules())} of these" in text


def test_what_is_written_to_a_context_between_blocks_counts() -> None:
    """In inference mode, where nobody counts what is written to a tensor. Blocks share it."""
    name = "wan-t2v"
    model: Any = model_of(name, FLOAT8_ROW)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    patched = patch_model(copy.deepcopy(model))
    seen: list[Tensor] = []

    def write(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[1].mul_(1.5)
        seen.append(args[1])

    for m in (model, patched):
        m.blocks[-1].register_forward_pre_hook(write)
    with torch.inference_mode():
        assert same(run(patched, name), run(model, name))
    assert seen
    assert not any(vars(t) for t in seen)


@pytest.mark.parametrize("how", ["hook", "dropout"])
def test_what_is_written_to_an_activation_inside_an_adapter_counts(how: str) -> None:
    """In inference mode, too. The layers of query, key and value share the activation."""
    name = "qwen-image"
    model: Any = model_of(name, FLOAT8_ROW)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    patched = patch_model(copy.deepcopy(model))
    for m in (model, patched):
        for path, module in m.named_modules():
            if how == "hook" and path.endswith("lora_A.default"):
                module.register_forward_pre_hook(lambda reader, args: (args[0].mul_(1.5),))
            if how == "dropout" and path.endswith("lora_dropout"):
                module["default"] = nn.Dropout(0.5, inplace=True)
        m.train()
    for mode in (torch.inference_mode, torch.no_grad):
        outputs = []
        for m in (patched, model):
            torch.manual_seed(2)
            with mode():
                outputs.append(run(m, name))
        assert same(*outputs)


def test_gradients_autocast_and_float32_leave_it_to_torchao() -> None:
    name = "wan-t2v"
    model = model_of(name, FLOAT8_ROW).requires_grad_(False)
    patched = patch_model(copy.deepcopy(model))
    arguments = tiny.inputs(name, 2, DTYPE)
    with torch.enable_grad():
        assert same(patched(**arguments, return_dict=False)[0], model(**arguments, return_dict=False)[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(patched(**arguments, return_dict=False)[0], model(**arguments, return_dict=False)[0])


COMPILED = {
    FLOAT8_ROW: ("wan-t2v", "qwen-image", "hunyuan-video", "flux", "flux2", "qwen-image-2.1", "lumina2"),
    INT8_ROW: ("wan-t2v", "qwen-image", "sd3.5-medium", "z-image-small", "ltx2"),
    FLOAT8_TENSOR: ("wan-t2v",),
    FLOAT8_ROW_BFL: ("flux", "flux2"),
}


@pytest.mark.parametrize(("law", "name"), [(law, name) for law, names in COMPILED.items() for name in names], ids=str)
def test_compiled_blocks_have_no_more_graphs(name: str, law: Law) -> None:
    """And no break: the path of the weights' own library is traced."""
    model = quantised.quantise_bfl(tiny.load(name, DTYPE), in_blocks) if law is FLOAT8_ROW_BFL else model_of(name, law)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    counts = []
    for m in (model, patch_model(copy.deepcopy(model))):
        torch._dynamo.reset()
        graphs.clear()
        for path in dict(m.named_modules()):
            if path.endswith(("blocks.0", "layers.0")) and in_blocks(path):
                m.get_submodule(path).compile(backend=backend, fullgraph=True)
        expected = run(m, name)
        counts.append((len(graphs), expected))
    assert counts[1][0] == counts[0][0] > 0
    assert same(counts[1][1], counts[0][1])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["flux", "chroma", "ovis-image", "flux2", "flux2-klein", "hunyuan-video", "lumina2", "qwen-image-2.1"])
def test_the_last_layer_of_an_mlp_is_given_its_activation_quantised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention's result beside it where that is read too, in one call."""
    model = model_of(name, FLOAT8_ROW)
    expected = run(model, name)
    patch_model(model)
    monkeypatch.setattr(activation, "served", lambda op, x: not x.requires_grad)
    assert same(run(model, name), expected)
    found = calls_of(model, name)
    assert found["gelu_quantize"] + found["swiglu_quantize"] > 0
    assert found["gelu"] == 0
    watched = next(m for path, m in model.named_modules() if isinstance(m, QuantizedLinear) and path.endswith(LAST_LAYERS))
    seen: list[Any] = []
    watched.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert same(run(model, name), expected)
    assert [type(x) for x in seen] == [Tensor]


LAST_LAYERS = ("proj_out", "linear_out", "to_out", "w2", "linear_2", "img_mlp.out")


def test_where_the_kernels_gelu_has_other_bits_pytorchs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditnorm.fused import feed_forward

    model = model_of("wan-t2v", FLOAT8_ROW)
    expected = run(model, "wan-t2v")
    patch_model(model)
    assert calls_of(model, "wan-t2v")["gelu_quantize"] > 0

    def off(x: Tensor, law: Law) -> Any:
        return feed_forward.quantize(1.01 * torch.nn.functional.gelu(x, approximate="tanh"), law)

    monkeypatch.setattr(feed_forward, "gelu_quantize", off)
    monkeypatch.setattr(feed_forward, "_known", {})
    assert same(run(model, "wan-t2v"), expected)
    assert list(feed_forward._known.values()) == [False]
