"""GELUs in place: where nobody can tell they are, and the memory that this saves; and with "single"
rounding in the product's kernel.
"""

import contextlib
import copy
import functools
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.utils.checkpoint
from diffusers.models.activations import GELU
from support import model_checks, tiny
from support.live_bytes import LiveBytes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ditnorm import patch_model, report, unpatch_model
from ditnorm.fused import gelu as gelu_module
from ditnorm.fused.gelu import FusedGELU, activate, linear_gelu
from ditnorm.fused.module import matches
from ditnorm.swapping import generated

DTYPE = torch.bfloat16
IN_PLACE = {"wan-t2v": 3, "wan-vace": 5, "qwen-image": 6, "hunyuan-video": 6, "hunyuan-video-token-replace": 6, "hunyuan-video-1.5": 4}


@contextlib.contextmanager
def gelus() -> Iterator[Counter[str]]:
    """Counts the calls of ours, by name. No mode does: where one is, nothing is overwritten."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(torch.ops.aten, "gelu_", counted("gelu_", torch.ops.aten.gelu_)),
        mock.patch.object(gelu_module, "addmm_activation", counted("addmm_activation", gelu_module.addmm_activation)),
    ):
        yield calls


def in_place(model: nn.Module, name: str) -> int:
    with gelus() as calls:
        tiny.run(model, tiny.inputs(name, 1, DTYPE))
    return calls["gelu_"]


def run(model: nn.Module, name: str) -> Tensor:
    return tiny.run(model, tiny.inputs(name, 1, DTYPE))


def test_the_gelu_of_diffusers_is_known() -> None:
    # Fails on a diffusers that has changed it: then compare, and add the fingerprint.
    assert matches(FusedGELU, GELU)


@pytest.mark.parametrize("name", IN_PLACE)
def test_every_gelu_of_a_patched_block_is_in_place_and_no_other(name: str) -> None:
    model = tiny.load(name, DTYPE)
    assert in_place(model, name) == 0
    assert in_place(patch_model(model), name) == IN_PLACE[name]
    assert in_place(copy.deepcopy(model), name) == IN_PLACE[name]
    assert in_place(pickle.loads(pickle.dumps(model)), name) == IN_PLACE[name]
    assert in_place(unpatch_model(model), name) == 0


def test_an_mlp_holds_its_inner_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gelu_module, "seen_by_a_mode", lambda: False)  # what counts the bytes is a mode
    block = tiny.load("wan-t2v", DTYPE).blocks[0]
    x = torch.randn(1, 64, 24, dtype=DTYPE)

    @torch.no_grad()
    def peak() -> int:
        with LiveBytes(iter([x, *block.parameters()])) as live:
            block.ffn(x)
        return live.peak

    upstream, inner = peak(), 64 * 48 * DTYPE.itemsize
    assert upstream == 2 * inner
    patch_model(nn.ModuleList([block]))
    assert peak() == inner + x.nbytes  # of the second linear, whose output is x's size


@pytest.mark.parametrize(
    ("name", "path"), [("wan-t2v", "blocks.1.ffn.net.0.proj"), ("hunyuan-video", "single_transformer_blocks.1.proj_mlp")]
)
def test_a_hook_on_the_linear_keeps_the_values_that_it_sees(name: str, path: str) -> None:
    model = tiny.load(name, DTYPE)
    seen: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    expected = run(model, name)
    assert torch.equal(run(patch_model(model), name), expected)
    assert torch.equal(seen[1], seen[0])
    assert in_place(model, name) == IN_PLACE[name] - 1


def test_hooks_on_the_activation_of_a_single_stream_block_are_called_with_its_values() -> None:
    model = tiny.load("hunyuan-video", DTYPE)
    seen: list[Tensor] = []
    for block, register in zip(model.single_transformer_blocks, ("register_forward_hook", "register_forward_pre_hook"), strict=True):
        getattr(block.act_mlp, register)(lambda module, args, *output: seen.extend((*args, *output)))
    expected = run(model, "hunyuan-video")
    assert torch.equal(run(patch_model(model), "hunyuan-video"), expected)
    assert all(torch.equal(patched, upstream) for upstream, patched in zip(seen[:3], seen[3:], strict=True))
    assert in_place(model, "hunyuan-video") == IN_PLACE["hunyuan-video"] - 2


class Kept(TorchDispatchMode):
    """Keeps what linears return, and what it was when they did."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("addmm", "linear"):
            self.outputs.append((result, result.clone()))
        return result


class KeptOfFunctions(TorchFunctionMode):
    """The same, of calls in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.outputs.append((result, result.clone()))
        return result


@pytest.mark.parametrize("mode", [Kept, KeptOfFunctions])
@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
def test_modes_keep_what_they_have_seen(name: str, mode: type) -> None:
    model = patch_model(tiny.load(name, DTYPE))
    with mode() as kept:
        run(model, name)
    assert kept.outputs
    assert all(torch.equal(output, before) for output, before in kept.outputs)
    with torch.device("cpu"):  # a mode that keeps nothing
        assert in_place(model, name)


@pytest.mark.parametrize("how", ["subclass", "wrapped on the class", "wrapped call", "wrapped function"])
@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
def test_linears_of_other_classes_keep_what_they_return(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny.load(name, DTYPE))
    expected, outputs = run(model, name), []
    method = "__call__" if how == "wrapped call" else "forward"
    original = getattr(nn.Linear, method)

    def remember(self: nn.Linear, x: Tensor) -> Tensor:
        output = original(self, x)
        outputs.append((output, output.clone()))
        return output

    if how == "wrapped function":
        linear = nn.functional.linear
        monkeypatch.setattr(nn.functional, "linear", lambda *args: (outputs.append(((out := linear(*args)), out.clone())), out)[1])
    elif how == "subclass":
        remembering = type("Remembering", (nn.Linear,), {"forward": remember})
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = remembering
    else:
        monkeypatch.setattr(nn.Linear, method, functools.wraps(original)(remember))
    assert torch.equal(run(model, name), expected)
    assert outputs
    assert all(torch.equal(output, before) for output, before in outputs)


@pytest.mark.parametrize(("owner", "attribute"), [(nn.functional, "gelu"), (nn.GELU, "forward")])
@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_gelu_replaced_for_all_is_called(order: str, name: str, owner: Any, attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = tiny.load(name, DTYPE), getattr(owner, attribute)
    if order == "after":
        patch_model(model)
    monkeypatch.setattr(owner, attribute, lambda *args, **kwargs: original(*args, **kwargs) * 0.5)
    expected = run(tiny.load(name, DTYPE), name)
    assert torch.equal(run(patch_model(model), name), expected)


def test_hooks_on_all_modules_keep_the_values_that_they_see() -> None:
    model = tiny.load("hunyuan-video", DTYPE)
    patch_model(model)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert in_place(model, "hunyuan-video") == 0
    finally:
        hook.remove()


def test_a_linear_whose_forward_was_replaced_keeps_what_it_returns() -> None:
    model = tiny.load("wan-t2v", DTYPE)
    linear = model.blocks[0].ffn.net[0].proj
    forward, returned = linear.forward, []

    def remember(x: Tensor) -> Tensor:
        returned.append(forward(x))
        return returned[-1]

    linear.forward = remember
    expected = run(model, "wan-t2v")
    assert torch.equal(run(patch_model(model), "wan-t2v"), expected)
    assert torch.equal(returned[1], returned[0])


@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
def test_adapters_run_as_upstream_does(name: str) -> None:
    model = tiny.load(name, DTYPE)
    # As pipelines do it; the second matrix is random too, or the adapter would do nothing.
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=r".*blocks\.\d+\.(ffn\.net\.0\.proj|ff\.net\.0\.proj|proj_mlp)", init_lora_weights=False)
    )
    expected = run(model, name)
    assert torch.equal(run(patch_model(model), name), expected)
    assert in_place(model, name) < IN_PLACE[name]


@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
def test_nothing_is_overwritten_where_a_gradient_flows(name: str) -> None:
    model = patch_model(tiny.load(name, DTYPE))
    with gelus() as calls:
        model(**tiny.inputs(name, 1, DTYPE))
    assert calls["gelu_"] == 0
    model.requires_grad_(False)
    with gelus() as calls:
        model(**tiny.inputs(name, 1, DTYPE))
    assert calls["gelu_"] == IN_PLACE[name]


def inner_and_gelu(approximate: str = "tanh") -> tuple[Tensor, Tensor, nn.Linear, Tensor]:
    """x, what a linear makes of it, the linear, and its GELU as a block computes it."""
    torch.manual_seed(0)
    x, linear = torch.randn(2, 3, 16, requires_grad=True), nn.Linear(16, 32)
    inner = linear(x)
    return x, inner, linear, activate(nn.GELU(approximate=approximate), linear, inner)


def upstreams_gradient(x: Tensor, linear: nn.Linear, approximate: str = "tanh") -> Tensor:
    (found,) = torch.autograd.grad(nn.functional.gelu(linear(x), approximate=approximate).square().sum(), x)
    return found


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_a_gradient_takes_the_place_of_what_gelu_was_given(approximate: str) -> None:
    x, inner, linear, y = inner_and_gelu(approximate)
    gradients: list[Tensor] = []
    inner.register_hook(gradients.append)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(found, upstreams_gradient(x, linear, approximate))
    assert gradients[0].data_ptr() == inner.data_ptr()


def test_no_gradient_takes_a_place_that_is_needed_again() -> None:
    """Of a graph that is kept, of gradients that are differentiated, and of what hooks may keep."""
    x, inner, linear, y = inner_and_gelu()
    values, expected = inner.detach().clone(), upstreams_gradient(x, linear)
    loss = y.square().sum()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
        assert torch.equal(inner, values)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    upstream = torch.autograd.grad(nn.functional.gelu(linear(x), approximate="tanh").square().sum(), x, create_graph=True)[0]
    assert torch.equal(second, torch.autograd.grad(upstream.square().sum(), x)[0])

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        x, inner, linear, y = inner_and_gelu()
    values = inner.detach().clone()
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)
    assert any(t.data_ptr() == inner.data_ptr() for t in kept)
    assert torch.equal(inner, values)


def test_a_batch_of_gradients_is_made_at_once_as_upstreams() -> None:
    x, inner, linear, y = inner_and_gelu()
    values, cotangents = inner.detach().clone(), torch.randn(3, *y.shape)
    (gradients,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True)
    upstream = nn.functional.gelu(linear(x), approximate="tanh")
    assert torch.equal(gradients, torch.autograd.grad(upstream, x, cotangents, is_grads_batched=True)[0])
    assert torch.equal(inner, values)


def test_a_mode_keeps_what_it_has_seen_of_a_backward_pass() -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeping(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kept.extend((t, t.clone()) for t in args if isinstance(t, Tensor))
            return func(*args, **(kwargs or {}))

    x, _, linear, y = inner_and_gelu()
    loss = y.square().sum()
    with Keeping():
        (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, upstreams_gradient(x, linear))
    assert kept
    assert all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
def test_a_hook_on_the_linear_keeps_the_values_that_it_sees_while_training(name: str) -> None:
    model, kept = patch_model(tiny.load(name, DTYPE)), []
    linears = [m.proj for m in model.modules() if isinstance(m, FusedGELU)]
    for linear in linears:
        linear.register_forward_hook(lambda module, args, output: kept.append((output, output.detach().clone())))
    output: Any = model(**tiny.inputs(name, 1, DTYPE), return_dict=False)[0]
    output.square().sum().backward()
    assert len(kept) == len(linears) > 0
    assert all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_in_place_and_checkpointing_go_together(reentrant: bool) -> None:
    x, linear, gelu = torch.randn(2, 3, 16, requires_grad=True), nn.Linear(16, 32), nn.GELU(approximate="tanh")
    y: Any = torch.utils.checkpoint.checkpoint(lambda x: activate(gelu, linear, linear(x)), x, use_reentrant=reentrant)
    (y.square().sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, upstreams_gradient(x, linear))


def test_the_compiler_sees_upstreams_code() -> None:
    ffn = patch_model(tiny.load("wan-t2v", DTYPE)).blocks[0].ffn
    functions: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        functions.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(1, 4, 24, dtype=DTYPE)
    with torch.no_grad():
        assert torch.equal(torch.compile(ffn, backend=backend, fullgraph=True)(x), ffn(x))
    assert nn.functional.gelu in functions


def in_epilogue(model: nn.Module, arguments: dict[str, Any]) -> int:
    with gelus() as calls:
        tiny.run(model, arguments)
    return calls["addmm_activation"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("name", IN_PLACE)
def test_single_rounding_computes_every_gelu_in_the_kernel_of_its_product(name: str) -> None:
    model, arguments = tiny.load(name, DTYPE).cuda(), model_checks.moved(tiny.inputs(name, 1, DTYPE), "cuda")
    assert in_epilogue(patch_model(model, rounding="single"), arguments) == IN_PLACE[name]
    assert in_epilogue(patch_model(model, rounding="eager"), arguments) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("change", ["hook", "float32", "autocast", "gradient", "adapter", "exact gelu", "without bias"])
def test_the_kernel_of_the_product_is_left_alone_where_somebody_could_tell(change: str) -> None:
    gelu = GELU(24, 48, approximate="none" if change == "exact gelu" else "tanh", bias=change != "without bias").cuda().to(DTYPE)
    x = torch.randn(2, 5, 24, device="cuda", dtype=DTYPE)
    upstream = copy.deepcopy(gelu)
    gelu.__class__ = generated.subclass(FusedGELU, GELU, "single")
    if change == "hook":
        gelu.proj.register_forward_hook(lambda module, args, output: None)
    elif change == "float32":
        gelu, upstream, x = gelu.float(), upstream.float(), x.float()
    elif change == "adapter":
        for module in (gelu, upstream):
            torch.manual_seed(0)
            module.proj = peft.tuners.lora.Linear(module.proj, "default", peft.LoraConfig(), r=2, lora_alpha=2)
    with torch.set_grad_enabled(change == "gradient"), torch.autocast("cuda", DTYPE, enabled=change == "autocast"), gelus() as calls:
        output, expected = gelu(x), upstream(x)
    assert calls["addmm_activation"] == 0
    assert torch.equal(output, expected)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 0, 24)])
def test_a_product_with_its_gelu_takes_any_shape(shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(24, 64), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(linear_gelu(linear, x), nn.functional.gelu(linear(x)))  # on the CPU PyTorch takes the exact one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gelu_of_the_products_kernel_is_the_tanh_one_rounded_once(dtype: torch.dtype) -> None:
    # One rounding instead of two independent ones of the same size, of which the first grows or
    # shrinks with the GELU: about 1 / sqrt(2).
    linear, x = nn.Linear(64, 256).to("cuda", dtype), 2 * torch.randn(512, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        exact = nn.functional.linear(*(t.double() for t in (x, linear.weight, linear.bias)))
        exact = nn.functional.gelu(exact, approximate="tanh")
        unfused, fused = nn.functional.gelu(linear(x), approximate="tanh"), linear_gelu(linear, x)
    assert (fused - exact).norm() <= 0.9 * (unfused - exact).norm()


class AnotherGELU(GELU):
    """A version that nobody has looked at."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_gelu_with_a_method_of_its_own_runs_it(when: str) -> None:
    model, upstream = (tiny.load("wan-t2v", DTYPE) for _ in range(2))
    if when == "after":
        patch_model(model)
    for either in (model, upstream):
        either.blocks[0].ffn.net[0].gelu = lambda gate: gate * 2
    assert torch.equal(run(patch_model(model, strict=True), "wan-t2v"), run(upstream, "wan-t2v"))


def test_what_is_not_known_or_was_replaced_is_left_alone_and_only_the_report_says_so() -> None:
    model = tiny.load("wan-t2v", DTYPE)
    model.blocks[0].ffn.net[0].__class__ = AnotherGELU
    model.blocks[1].ffn.net[0].forward = lambda hidden_states: hidden_states.repeat(1, 1, 2)
    expected = run(model, "wan-t2v")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model, strict=True)
    assert all(generated.origin_of(type(block)) for block in model.blocks)
    assert torch.equal(run(model, "wan-t2v"), expected)
    assert in_place(model, "wan-t2v") == 1
    (found,) = report(model).transformers
    assert list(found.unfused_activations.values()) == [["blocks.0.ffn.net.0"], ["blocks.1.ffn.net.0"]]
    unpatch_model(model)
    assert type(model.blocks[0].ffn.net[0]) is AnotherGELU
