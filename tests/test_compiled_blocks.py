"""What Dynamo checks before each call of a compiled block, its guards: what is changed after
compiling is seen where an unpatched block sees it, and nothing is checked that only ditnorm keeps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_qwenimage
from support import quantised, tiny
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from ditnorm import patch_model, unpatch_model
from ditnorm.ops.quantization import FLOAT8_ROW, INT8_ROW, Law
from ditnorm.swapping.torch_private import asked_once, traced_as

Change = Callable[[Any], object]


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block:
    """A block of a model, compiled, with what the model calls it with."""

    def __init__(self, patched: bool, law: Law | None = None) -> None:
        dtype = torch.float32 if law is None else torch.bfloat16
        self.model = tiny.load("qwen-image", dtype).eval()
        if law is not None:
            quantised.quantise(self.model, law, lambda name: "transformer_blocks" in name)
        if patched:
            patch_model(self.model)
        self.block: Any = self.model.transformer_blocks[0]  # type: ignore[index,union-attr]
        calls: list[Any] = []
        keep = self.block.register_forward_pre_hook(lambda module, *call: calls.append(call), with_kwargs=True)
        tiny.run(self.model, tiny.inputs("qwen-image", 2, dtype))
        keep.remove()
        self.arguments, self.named = calls[0]
        self.graphs = 0
        self.block.compile(fullgraph=True, backend=self._backend)
        self.run()
        assert self.graphs == 1

    def _backend(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward

    @torch.no_grad()
    def run(self) -> Tensor:
        return torch.cat([stream.flatten() for stream in self.block(*self.arguments, **self.named)])

    def run_eagerly(self) -> Tensor:
        compiled, self.block._compiled_call_impl = self.block._compiled_call_impl, None
        try:
            return self.run()
        finally:
            self.block._compiled_call_impl = compiled


class Doubled(nn.Module):
    """As an adapter stands in the place of a layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)  # type: ignore[no-any-return]


def _set(path: str, value: Any) -> Change:
    def change(block: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, value)

    return change


def _adapt(block: Any) -> None:
    block.attn.to_q = Doubled(block.attn.to_q)


CHANGES: dict[str, Change] = {
    "another norm": _set("img_norm1", nn.LayerNorm(48, eps=0.5, elementwise_affine=False)),
    "a norm's eps": _set("img_norm2.eps", 0.5),
    "the eps of the query's norm": _set("attn.norm_q.eps", 0.5),
    "the eps of the text's keys' norm": _set("attn.norm_added_k.eps", 0.5),
    "a norm's forward": _set("txt_norm1.forward", lambda x: torch.zeros_like(x)),
    "an adapter": _adapt,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_compiled_block_sees_what_is_changed_in_the_model(name: str, patched: bool) -> None:
    block = Block(patched)
    before = block.run()
    CHANGES[name](block.block)
    after = block.run()
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, block.run_eagerly(), rtol=0, atol=0)


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize(
    ("holder", "name"), [(transformer_qwenimage, "apply_rotary_emb_qwen"), (transformer_qwenimage, "dispatch_attention_fn"), (F, "gelu")]
)
def test_a_compiled_block_sees_functions_that_are_replaced(holder: Any, name: str, patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(patched)
    before, upstream = block.run(), getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda *arguments, **named: 2 * upstream(*arguments, **named))
    after = block.run()
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, block.run_eagerly(), rtol=0, atol=0)


def test_a_compiled_block_follows_the_law_and_unpatching() -> None:
    block = Block(patched=True)
    patch_model(block.model, rounding="single")
    block.run()
    assert block.graphs == 2
    unpatch_model(block.model)
    block.run()
    assert block.graphs == 3
    patch_model(block.model)
    block.run()
    assert block.graphs == 3


@pytest.mark.parametrize("law", [None, FLOAT8_ROW, INT8_ROW], ids=str)
def test_no_call_of_a_compiled_block_looks_at_what_only_ditnorm_keeps(law: Law | None) -> None:
    """Each thing looked at costs the host in every call; there were twice as many as unpatched."""
    block = Block(True, law).block
    (entry,) = _debug_get_cache_entry_list(type(block).forward.__code__)
    guards = str(entry.guard_manager)
    assert "img_norm1" in guards
    kept = ("own_forward", "known_forward", "known_function", "_inlined", "_modulated", "origin", "_dispatch")
    assert [name for name in kept if f").{name}" in guards or f"['{name}']" in guards] == []


class Asking(nn.Module):
    doubles = True

    @asked_once
    def ask(self) -> bool:
        return self.doubles

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.ask() else x


def test_dynamo_takes_what_is_asked_once_for_a_constant() -> None:
    module, x = Asking(), torch.ones(2)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 2 * x)
    module.doubles = False
    assert torch.equal(compiled(x), 2 * x)
    assert torch.equal(module(x), x)


def test_dynamo_traces_a_function_as_what_it_is_to_be_traced_as() -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    @traced_as(doubled)
    def tripled(x: Tensor) -> Tensor:
        return 3 * x

    x = torch.ones(2)
    assert torch.equal(tripled(x), 3 * x)
    assert torch.equal(torch.compile(lambda x: tripled(x), backend="eager", fullgraph=True)(x), 2 * x)
