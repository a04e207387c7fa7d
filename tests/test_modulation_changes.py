"""What empties a table of precomputed modulations, and what switches it off."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from compatibility import lora
from compatibility.feature import DEVICE, arguments_of, forward, load
from support import quantised, tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ditnorm
from ditnorm.fused.modulation import streaming
from ditnorm.ops.quantization import INT8_ROW
from ditnorm.patching.restoring import tables

FAMILIES = ["Qwen-Image", "HunyuanVideo"]
LINEAR = {"Qwen-Image": "transformer_blocks.1.img_mod.1", "HunyuanVideo": "single_transformer_blocks.1.norm.linear"}


def linear(model: nn.Module, family: str) -> Any:
    return model.get_submodule(LINEAR[family])


def fused_and_unloaded(model: Any, family: str) -> None:
    lora.add(model).fuse_lora()
    model.unload_lora()


def scaled_behind_the_version(model: Any, family: str) -> None:
    linear(model, family).weight.data.mul_(2)


def another_parameter(model: Any, family: str) -> None:
    linear(model, family).weight = nn.Parameter(linear(model, family).weight.detach() * 2)


def another_linear(model: Any, family: str) -> None:
    old, parent = linear(model, family), model.get_submodule(LINEAR[family].rpartition(".")[0])
    new = copy.deepcopy(old)
    new.weight.data *= 2
    setattr(parent, LINEAR[family].rpartition(".")[2], new)


def there_and_back(model: Any, family: str) -> None:
    """Float16 has fewer exponents, so that some weights change."""
    with torch.no_grad():
        linear(model, family).weight *= 1e-5
    forward(model, family)
    model.half()
    model.bfloat16()


def hooked(model: Any, family: str) -> None:
    linear(model, family).register_forward_hook(lambda module, args, output: output * 2)


def activation(model: nn.Module, family: str) -> tuple[nn.Module, str]:
    """What stands before the linear layer: the module that holds it, and its name there."""
    holder = LINEAR[family].rpartition(".")[0]
    return model.get_submodule(holder), "0" if family == "Qwen-Image" else "silu"


def another_activation(model: Any, family: str) -> None:
    holder, name = activation(model, family)
    holder._modules[name] = nn.Tanh()


def hooked_activation(model: Any, family: str) -> None:
    holder, name = activation(model, family)
    holder.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)


def activation_of_another_forward(model: Any, family: str) -> None:
    holder, name = activation(model, family)
    holder.get_submodule(name).forward = torch.tanh


def hooked_inside_an_adapter(model: Any, family: str) -> None:
    lora.add(model)
    forward(model, family)
    for module in linear(model, family).lora_B.values():
        module.register_forward_hook(lambda module, args, output: output * 2)


def of_another_class(model: Any, family: str) -> None:
    class Negative(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    linear(model, family).__class__ = Negative


def loaded_anew(model: Any, family: str) -> None:
    model.load_state_dict({key: t * 1.5 if "mod.1" in key or "linear" in key else t for key, t in model.state_dict().items()})


def assigned(model: Any, family: str) -> None:
    model.load_state_dict({key: t * 1.5 if "mod.1" in key or "linear" in key else t for key, t in model.state_dict().items()}, assign=True)


def weight_taken_out(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    del layer.weight
    return weight


def in_a_buffer(model: Any, family: str) -> None:
    layer = linear(model, family)
    layer.register_buffer("weight", weight_taken_out(layer))
    forward(model, family)
    layer.weight.mul_(2)


def in_an_attribute(model: Any, family: str) -> None:
    if DEVICE != "cpu":
        pytest.skip("weights in host memory are looked for among Parameters and buffers")
    layer = linear(model, family)
    layer.weight = weight_taken_out(layer)
    forward(model, family)
    layer.weight.mul_(2)


def in_a_part_of_a_quantised_weight(model: Any, family: str) -> None:
    if DEVICE != "cpu":
        pytest.skip("weights in host memory would be quantised there, and those of the unpatched model on the GPU")
    layer = linear(model, family)
    layer.weight = nn.Parameter(quantised.weight(layer.weight, INT8_ROW), requires_grad=False)
    forward(model, family)
    layer.weight.scale.mul_(2)


def scale_of_an_adapter_in_a_tensor(model: Any, family: str) -> None:
    """As PEFT has it for adapters that are swapped under compiled code."""
    lora.add(model)
    layer = linear(model, family)
    layer.scaling["a"] = torch.tensor(1.0)
    forward(model, family)
    layer.scaling["a"].fill_(4.0)


CHANGES = [
    in_a_buffer,
    in_an_attribute,
    in_a_part_of_a_quantised_weight,
    scale_of_an_adapter_in_a_tensor,
    fused_and_unloaded,
    scaled_behind_the_version,
    another_parameter,
    another_linear,
    there_and_back,
    hooked,
    hooked_inside_an_adapter,
    of_another_class,
    another_activation,
    hooked_activation,
    activation_of_another_forward,
    loaded_anew,
    assigned,
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_empty_the_table(change: Callable[[Any, str], None], family: str) -> None:
    unpatched = load(family)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    before = forward(model, family)
    with torch.no_grad():
        change(unpatched, family)
        change(model, family)
    expected = forward(unpatched, family)
    assert not torch.equal(expected, before)
    for _ in range(2):
        assert torch.equal(forward(model, family), expected)
    (table,) = tables(model)
    assert table.changes
    ditnorm.unpatch_model(model)
    assert torch.equal(forward(model, family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_adapters_are_part_of_the_weights(family: str) -> None:
    unpatched = load(family)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    for m in (unpatched, model):
        lora.add(lora.add(m, "a", 1), "b", 2, rank=2)
    for names, weights in ((["a"], [1.0]), (["a"], [0.3]), (["a", "b"], [0.3, 0.7]), (["b"], [1.0])):
        for m in (unpatched, model):
            m.set_adapters(names, weights)
        assert torch.equal(forward(model, family), forward(unpatched, family))
    arguments = arguments_of(family)
    for scale in (0.5, 2.0):
        given = arguments | {"attention_kwargs": {"scale": scale}}
        assert torch.equal(tiny.run(model, dict(given)), tiny.run(unpatched, dict(given)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_drops_at_random_has_no_rows(family: str) -> None:
    unpatched = load(family)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    for training in (True, False, True):
        outputs = []
        for m in (unpatched, model):
            if training and "a" not in getattr(m, "peft_config", {}):
                lora.add(m, lora_dropout=0.5)
            m.train(training)
            torch.manual_seed(3)
            outputs.append(forward(m, family))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_inference_mode_have_no_table(family: str) -> None:
    """Nobody counts what is written to them."""
    unpatched = load(family)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    forward(model, family)
    for m in (unpatched, model):
        with torch.inference_mode():
            linear(m, family).weight = nn.Parameter(linear(m, family).weight * 2, requires_grad=False)
    with pytest.warns(UserWarning, match=r"precomputed any more: .* inference mode"):
        assert torch.equal(forward(model, family), forward(unpatched, family))
    assert not tables(model)
    with pytest.raises(RuntimeError, match=r"nothing was changed: .* inference mode"):
        ditnorm.precompute_modulation(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_precomputing_and_restoring_in_inference_mode(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights, which move as between devices, stay what they were."""
    monkeypatch.setattr(streaming, "_home", Tensor.clone)
    unpatched = load(family)
    expected = forward(unpatched, family)
    model = copy.deepcopy(unpatched)
    with torch.inference_mode():
        ditnorm.precompute_modulation(model)
        (table,) = tables(model)
        assert torch.equal(forward(model, family), expected)
    assert torch.equal(forward(model, family), expected)
    assert table.hits
    with torch.inference_mode():
        ditnorm.unpatch_model(model)
    assert not any(p.is_inference() for p in model.parameters())
    assert torch.equal(forward(model, family), expected)


def test_a_table_that_was_moved_in_inference_mode_is_made_anew() -> None:
    family = "Qwen-Image"
    unpatched = load(family)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    (table,) = tables(model)
    for _, module, _ in table.modules:
        with torch.inference_mode():
            module.__dict__["modulation_table"] = module.modulation_table.clone()
    assert torch.equal(forward(model, family), forward(unpatched, family))


def test_a_table_that_is_given_up_between_two_embeddings_is_restored_once() -> None:
    name = "hunyuan-video-token-replace"  # it makes two in one call
    unpatched, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 1, torch.bfloat16)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    tiny.run(model, arguments)
    for m in (unpatched, model):
        blocks: Any = m.transformer_blocks
        blocks[0], blocks[1] = blocks[1], blocks[0]
    with pytest.warns(UserWarning, match="aren't precomputed any more"):
        output = tiny.run(model, arguments)
    assert torch.equal(output, tiny.run(unpatched, arguments))
    assert not tables(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_block_gives_the_table_up(family: str) -> None:
    class Doubled(nn.Module):
        """Reads what it is given for an embedding."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            embedding = kwargs["temb"] if "temb" in kwargs else args[2]
            return tuple(t * (1 + embedding.mean()) for t in self.block(*args, **kwargs))

    unpatched = load(family)
    model = ditnorm.precompute_modulation(copy.deepcopy(unpatched))
    forward(model, family)
    for m in (unpatched, model):
        m.transformer_blocks[1] = Doubled(m.transformer_blocks[1])
    with pytest.warns(UserWarning, match=r"aren't precomputed any more: transformer_blocks\.1 was replaced"):
        output = forward(model, family)
    assert torch.equal(output, forward(unpatched, family))
    assert not tables(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_weights(family: str) -> None:
    name = {"Qwen-Image": "qwen-image", "HunyuanVideo": "hunyuan-video"}[family]
    arguments = tiny.inputs(name, 1, torch.float32)
    gradients: list[Tensor] = []
    for prepare in (ditnorm.patch_model, ditnorm.precompute_modulation):
        model = prepare(tiny.load(name, torch.float32))
        tiny.run(model, arguments)
        model(**arguments, return_dict=False)[0].square().sum().backward()
        gradients.append(model.get_submodule(LINEAR[family]).weight.grad)  # type: ignore[arg-type]
    assert torch.equal(*gradients)


def test_a_hook_on_the_embedding_sees_the_embedding() -> None:
    seen: list[Tensor] = []
    model = ditnorm.precompute_modulation(load("Qwen-Image"))
    expected = forward(model, "Qwen-Image")
    handle = model.time_text_embed.register_forward_hook(lambda module, args, output: seen.append(output))  # type: ignore[union-attr]
    assert torch.equal(forward(model, "Qwen-Image"), expected)
    assert seen[0].is_floating_point()
    handle.remove()
    hooked = load("Qwen-Image")
    hooked.time_text_embed.register_forward_hook(lambda module, args, output: None)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="nothing was changed: model: time_text_embed has a forward hook"):
        ditnorm.precompute_modulation(hooked)


def test_saving_and_loading_see_the_weights_as_ever(tmp_path: Any) -> None:
    model: Any = load("Qwen-Image")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    ditnorm.precompute_modulation(model)
    expected = forward(model, "Qwen-Image")
    assert {key: t.shape for key, t in model.state_dict().items()} == {key: t.shape for key, t in before.items()}
    assert all(torch.equal(t.cpu(), before[key].cpu()) for key, t in model.state_dict().items())
    assert [name for name, _ in model.named_parameters()] == list(before)
    model.save_pretrained(tmp_path)
    loaded = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).to(DEVICE)
    assert torch.equal(forward(loaded, "Qwen-Image"), expected)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.zeros(2, 2), r"shape \[2, 2\]"),
        ([1.0], "list"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64 on cpu"),
        (torch.zeros(2, dtype=torch.bool), "torch.bool on cpu"),
        (torch.zeros(2, device="meta"), "torch.float32 on meta"),
    ],
)
def test_timesteps_of_another_form_are_refused(given: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"timesteps: expected a 1-D Tensor, .* got {got}"):
        ditnorm.precompute_modulation(load("Qwen-Image"), timesteps=given)


def test_a_part_of_a_model_has_no_table() -> None:
    block = load("Qwen-Image").transformer_blocks[0]
    with pytest.raises(ValueError, match=r"QwenImageTransformerBlock is a part of a model, .* pass the model or the pipeline"):
        ditnorm.precompute_modulation(block)


def test_an_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    original = diffusers.QwenImageTransformer2DModel.forward
    monkeypatch.setattr(diffusers.QwenImageTransformer2DModel, "forward", changed)
    model = load("Qwen-Image")
    with pytest.raises(RuntimeError, match=r"nothing was changed: model: .* is not a version that ditnorm knows"):
        ditnorm.precompute_modulation(model)
    assert not tables(model)


def test_a_registry_of_hooks_that_ditnorm_does_not_know_is_no_group_offloading() -> None:
    model, expected = load("Qwen-Image"), forward(load("Qwen-Image"), "Qwen-Image")
    model.transformer_blocks[0].img_mod._diffusers_hook = object()
    ditnorm.precompute_modulation(model)
    for _ in range(2):
        assert torch.equal(forward(model, "Qwen-Image"), expected)


def test_a_model_sharded_afterwards_gives_the_table_up(tmp_path: Path) -> None:
    model: Any = load("Qwen-Image")
    expected = forward(model, "Qwen-Image")
    ditnorm.precompute_modulation(model)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        mesh = init_device_mesh(next(model.parameters()).device.type, (1,))
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.warns(UserWarning, match="aren't precomputed any more: .*weight is spread over several devices"):
            actual = forward(model, "Qwen-Image")
        assert torch.equal(actual, expected)
        assert torch.equal(forward(model, "Qwen-Image"), expected)
        assert not tables(model)
    finally:
        dist.destroy_process_group()
