"""Classes made of a fused body and an upstream class: one for each pair, found again by pickle,
gone with what they were made of.
"""

import abc
import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.normalization import FP32LayerNorm
from support import tiny
from support.patched import DTYPE, fused_calls, run
from torch import nn

from ditnorm.fused.attention import FusedAttention
from ditnorm.layers import LayerNormScaleShift
from ditnorm.patching import patch_model, unpatch_model
from ditnorm.swapping import block_registry, generated
from ditnorm.swapping.fingerprint import fingerprint


def made_of(origin: type, rounding: str = "eager") -> type:
    return generated.subclass(LayerNormScaleShift, origin, rounding)


class Outer:
    class Norm(nn.LayerNorm):
        pass


class AbstractNorm(nn.LayerNorm, abc.ABC):
    """A norm with a metaclass of its own."""


ORIGINS = [nn.LayerNorm, FP32LayerNorm, Outer.Norm, AbstractNorm]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_generated_class_has_upstreams_name_and_is_an_upstream_class(origin: type) -> None:
    cls = made_of(origin)
    assert cls.__name__ == origin.__name__
    assert issubclass(cls, origin)
    assert generated.origin_of(cls) is origin
    assert vars(cls)["rounding"] == "eager"
    assert made_of(origin) is cls
    assert made_of(origin, "single") is not cls


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("origin", ORIGINS)
def test_pickle_and_copy_find_the_same_class(origin: type, protocol: int) -> None:
    cls = made_of(origin)
    assert pickle.loads(pickle.dumps(cls, protocol)) is cls
    assert pickle.loads(pickle._dumps(cls, protocol)) is cls  # type: ignore[attr-defined]
    assert copy.deepcopy(cls) is cls


def test_a_class_derived_from_a_generated_one_is_nobodys_stand_in_and_pickles_by_its_name() -> None:
    assert generated.origin_of(Derived) is None
    assert pickle.loads(pickle.dumps(Derived)) is Derived


class Derived(made_of(nn.LayerNorm)):  # type: ignore[misc]
    pass


# One model of a user's own block class, defined in a script, and a norm defined inside a function's
# class.
SCRIPT = """
import copy, pickle, sys
import torch
import torch.multiprocessing as multiprocessing
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from torch import nn

class Holder:
    class Block(transformer_wan.WanTransformerBlock):
        pass

CONFIG = {config}
ARGUMENTS = {{"hidden_states": torch.ones(1, 4, 2, 8, 8), "timestep": torch.tensor([7]), "encoder_hidden_states": torch.ones(1, 7, 16)}}

@torch.no_grad()
def run(model):
    return model(**ARGUMENTS, return_dict=False)[0]

def in_another_process(model, queue):
    queue.put((type(model.blocks[0]).__mro__[2].__qualname__, run(model).numpy()))

if __name__ == "__main__":
    import ditnorm
    from ditnorm.swapping import generated

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG).eval()
    for block in model.blocks:
        block.__class__ = Holder.Block
    expected = run(model)
    ditnorm.patch_model(model, strict=True)
    assert generated.origin_of(type(model.blocks[0])) is Holder.Block

    torch.save(model, sys.argv[1])
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(sys.argv[1], weights_only=False)):
        assert type(made.blocks[0]) is type(model.blocks[0])
        assert torch.equal(run(made), expected)
        assert generated.origin_of(type(ditnorm.unpatch_model(made).blocks[0])) is None
        assert type(made.blocks[0]) is Holder.Block

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(model, queue))
    process.start()
    _, output = queue.get(timeout=300)
    process.join()
    assert torch.equal(torch.from_numpy(output), expected)
"""


def test_a_users_own_block_class_of_a_script_is_copied_saved_and_sent_to_a_spawned_process(tmp_path: Path) -> None:
    config = tiny.MODELS["wan-t2v"].config
    (tmp_path / "script.py").write_text(SCRIPT.format(config=config))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_classes_redefined_again_and_again_leave_nothing_behind() -> None:
    def redefine() -> list[weakref.ref[type]]:
        class Norm(nn.LayerNorm):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x)

        assert fingerprint(Norm.forward) is not None
        return [weakref.ref(Norm), *(weakref.ref(made_of(Norm, rounding)) for rounding in ("eager", "single"))]

    left = [redefine() for _ in range(3)]
    gc.collect()
    assert not any(cls() is not None for classes in left for cls in classes)


def test_a_generated_class_lives_as_long_as_its_origin() -> None:
    # A model that is unpatched and patched again has the same classes, so nothing is compiled
    # again.
    before = id(made_of(Outer.Norm))
    gc.collect()
    assert id(made_of(Outer.Norm)) == before


def test_threads_that_make_a_class_at_once_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, made = threading.Barrier(8), []
    make = generated._make
    monkeypatch.setattr(generated, "_make", lambda *arguments: (threading.Event().wait(0.01), make(*arguments))[1])

    class Norm(nn.LayerNorm):
        pass

    def work() -> None:
        barrier.wait()
        made.append(made_of(Norm))

    threads = [threading.Thread(target=work) for _ in range(barrier.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == barrier.parties
    assert len(set(made)) == 1


def test_a_class_made_while_a_class_is_made_is_no_deadlock() -> None:
    class Norm(nn.LayerNorm):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            made_of(nn.LayerNorm)

    assert generated.origin_of(made_of(Norm)) is Norm


def test_the_processors_that_a_class_knows_are_those_of_its_origin() -> None:
    model = patch_model(tiny.load("wan-t2v", DTYPE))
    attention = model.blocks[0].attn1
    assert isinstance(attention, FusedAttention)
    assert type(attention.processor) in attention.known


def test_dynamo_traces_generated_classes_without_a_break_and_guards_on_them() -> None:
    model = tiny.load("wan-t2v", DTYPE)
    expected = run(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in patch_model(model).blocks:
        block.compile(backend="eager", fullgraph=True)
    assert fused_calls(lambda: torch.testing.assert_close(run(model), expected, rtol=0, atol=0)) > 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    unpatch_model(model)
    assert fused_calls(lambda: torch.testing.assert_close(run(model), expected, rtol=0, atol=0)) == 0
    patch_model(model)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert fused_calls(lambda: torch.testing.assert_close(run(model), expected, rtol=0, atol=0)) > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before == 2 * graphs  # the first graphs still fit


# diffusers' table of blocks


def test_a_block_class_that_a_user_registered_stays_known_to_caches() -> None:
    class Block(nn.Module):
        pass

    metadata = TransformerBlockMetadata(return_hidden_states_index=0)
    TransformerBlockRegistry.register(Block, metadata)
    try:
        cls = generated.subclass(LayerNormScaleShift, Block, "eager")
        assert TransformerBlockRegistry.get(cls).return_hidden_states_index == 0
        assert metadata._cls is Block
        TransformerBlockRegistry._registry.pop(cls)
    finally:
        TransformerBlockRegistry._registry.pop(Block)


@pytest.mark.parametrize("gone", ["get", "register", "TransformerBlockRegistry"])
def test_a_table_of_blocks_that_changed_is_left_alone(monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    from diffusers.hooks import _helpers

    monkeypatch.delattr(_helpers if gone == "TransformerBlockRegistry" else TransformerBlockRegistry, gone)
    block = type(tiny.load("wan-t2v", DTYPE).blocks[0])
    block_registry.register(made_of(nn.LayerNorm), block)
