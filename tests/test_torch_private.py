"""Private names of PyTorch: where a release lacks one, what stands in for it is right, if
slower.
"""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torch_module

from ditnorm.swapping import torch_private

NAMES: list[tuple[Any, str]] = [
    (torch._C, "_is_any_autocast_enabled"),
    (torch.autograd.forward_ad, "_current_level"),
    (torch.compiler, "_is_exporting_flag"),
    (torch, "_addmm_activation"),
    (torch, "_scaled_mm"),
    (torch, "_int_mm"),
    (torch_module, "_global_forward_hooks"),
    (torch_module, "_global_forward_pre_hooks"),
    (torch_module, "_global_backward_hooks"),
    (torch_module, "_global_backward_pre_hooks"),
    (torch.nn.Module, "_compiled_call_impl"),
    (torch._C, "_functorch"),
    (torch._C._functorch, "peek_interpreter_stack"),
    (torch._C._functorch, "is_dead_tensor_wrapper"),
    (torch._C._functorch, "is_legacy_batchedtensor"),
    (torch._C, "_get_dispatch_mode"),
    (torch._C, "_is_tracing"),
    (torch._C, "_TorchDispatchModeKey"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C._autograd, "_top_saved_tensors_default_hooks"),
    (torch._C._autograd, "_get_current_graph_task_keep_graph"),
    (torch._C._autograd, "_saved_tensors_hooks_is_enabled"),
]


def _in_a_backward_pass(question: Callable[[], bool]) -> bool:
    answered: list[bool] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: answered.append(question()))
    y.backward()
    return answered[0]


def answers(private: ModuleType) -> dict[str, bool]:
    return {
        "any_autocast_enabled": private.any_autocast_enabled(),
        "forward_ad": private.forward_ad._current_level >= 0,
        "compiler": private.compiler._is_exporting_flag,
        "addmm_activation": private.addmm_activation is None,
        "scaled_mm": private.scaled_mm is None,
        "int_mm": private.int_mm is None,
        "hooks_for_all_modules": any(private.hooks_for_all_modules),
        "compiled_alone": private.compiled_alone(torch.nn.Identity()),
        "outlived_transform": private.outlived_transform(torch.ones(1)),
        "in_a_batch": private.in_a_batch(torch.ones(1)),
        "transformed_or_traced": private.transformed_or_traced(),
        "seen_by_a_mode": private.seen_by_a_mode(),
        "saves_through_hooks": private.saves_through_hooks(),
        "takes_saved_tensors_hooks": not private.takes_saved_tensors_hooks(),
        "graph_is_kept": _in_a_backward_pass(private.graph_is_kept),
    }


def test_nothing_is_on_in_plain_eager_mode() -> None:
    assert not any(answers(torch_private).values())


@pytest.mark.parametrize(("holder", "name"), NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_asked_any_more_is_taken_for_true(holder: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(holder, name)
    spec = importlib.util.spec_from_file_location("again", torch_private.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert sum(answers(again).values()) == (3 if name == "_functorch" else 1)  # which holds those of three answers


def test_an_operator_without_the_name_of_what_it_calls_is_called_itself() -> None:
    op = torch.ops.aten.relu.default
    assert torch_private.without_frame(op) is op._op
    assert torch_private.without_frame(torch.relu) is torch.relu


def test_the_nodes_of_a_function_are_known_by_their_class() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    assert type(Doubled.apply(torch.ones(1, requires_grad=True)).grad_fn) is torch_private.node_of(Doubled)
    assert torch_private.node_of(object) is None  # type: ignore[arg-type]


def test_a_module_that_is_compiled_alone_is_told_from_others() -> None:
    module = torch.nn.Identity()
    assert not torch_private.compiled_alone(module)
    module.compile(backend="eager")
    assert torch_private.compiled_alone(module)


def test_what_a_tracer_puts_around_calls_of_modules_is_told_from_what_others_put_there() -> None:
    found = []

    def call(x: torch.Tensor) -> torch.Tensor:
        traced = torch.nn.Module.__call__

        @functools.wraps(traced)
        def shown(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return traced(module, *args, **kwargs)

        found.extend([torch_private.only_traced(traced), torch_private.only_traced(shown)])
        return x + 1

    make_fx(call)(torch.zeros(1))
    assert found == [True, False]
    assert not torch_private.only_traced(torch.nn.Module.__call__)


WITHOUT_THEM = """
import torch
from diffusers import WanTransformer3DModel
del torch._C._is_any_autocast_enabled, torch._addmm_activation
del torch.autograd.forward_ad._current_level  # PyTorch itself reads it in forward mode, which is on nowhere below
from ditnorm import patch_model
from support import tiny

model = tiny.load("wan-t2v", torch.float32)
arguments = tiny.inputs("wan-t2v", 2, torch.float32)

def outputs():
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cast = tiny.run(model, arguments)
    trained = model(**arguments, return_dict=False)[0]
    trained.sum().backward()
    return [tiny.run(model, arguments), cast, trained.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

expected = outputs()
patch_model(model, strict=True)
got = outputs()
assert len(got) == len(expected) and all(map(torch.equal, got, expected))
"""


def test_a_model_has_its_bits_and_gradients_without_them() -> None:
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r})\n{WITHOUT_THEM}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
