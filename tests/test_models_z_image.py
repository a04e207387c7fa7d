"""Z-Image, patched: Turbo and Base, Omni."""

import pytest
import torch
from support import tiny

from ditnorm import kernels, patch_model


@pytest.mark.parametrize("norms", [("attention_norm2",), ("ffn_norm1",), ("attention_norm2", "ffn_norm2")])
def test_a_hook_on_a_norm_sees_its_values(norms):
    """Where the norm of a branch, or the one behind it, is watched, each is a call of its own."""
    model, arguments = tiny.load("z-image", torch.bfloat16), tiny.inputs("z-image", 1, torch.bfloat16)
    seen = []
    for norm in norms:
        model.layers[0].get_submodule(norm).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    expected = tiny.run(model, arguments)
    before = kernels.counts()
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)
    calls = {op: n - before[op, "reference"] for (op, path), n in kernels.counts().items() if path == "reference"}
    assert calls["norm_scale_residual_norm_scale_shift"] == 4 - 1
    assert calls["norm_scale_residual"] == 4 - ("ffn_norm2" in norms)
    for ours, theirs in zip(seen[len(norms) :], seen[: len(norms)], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_norms_of_different_eps_are_calls_of_their_own():
    model, arguments = tiny.load("z-image", torch.bfloat16), tiny.inputs("z-image", 1, torch.bfloat16)
    model.layers[1].attention_norm2.eps = 0.1
    expected = tiny.run(model, arguments)
    assert torch.equal(tiny.run(patch_model(model, strict=True), arguments), expected)


def test_weights_kept_in_another_dtype_give_upstreams_results():
    """A float32 weight of a branch's norm makes a float32 stream."""
    model, arguments = tiny.load("z-image", torch.bfloat16), tiny.inputs("z-image", 1, torch.bfloat16)
    for block in model.layers:
        block.attention_norm2.float()
        block.ffn_norm2.float()
    model.all_final_layer["2-1"].linear.float()
    expected = tiny.run(model, arguments)
    assert expected.dtype is torch.float32
    assert torch.equal(tiny.run(patch_model(model), arguments), expected)


@pytest.mark.parametrize("modulated", [True, False])
def test_the_blocks_of_a_controlnet_are_fused(modulated):
    from diffusers.models.controlnets.controlnet_z_image import ZImageControlTransformerBlock

    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(ZImageControlTransformerBlock(i, 48, 3, 3, 1e-5, True, modulated, block_id=i) for i in range(2))
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    blocks.to(torch.bfloat16)
    c, x = torch.randn(2, 1, 40, 48).bfloat16()
    angles = torch.randn(1, 40, 8)
    more = (None, torch.polar(torch.ones_like(angles), angles), torch.randn(1, 48).bfloat16() if modulated else None)

    @torch.no_grad()
    def run():
        return blocks[1](blocks[0](c, x, *more), x, *more)

    expected = run()
    patch_model(blocks, strict=True)
    before = kernels.counts()
    assert torch.equal(run(), expected)
    calls = {op: n - before[op, path] for (op, path), n in kernels.counts().items() if n != before[op, path]}
    ops = ("norm_scale_shift", "qk_norm_rope", "norm_scale_residual", "norm_scale_residual_norm_scale_shift", "swiglu")
    assert calls == dict.fromkeys(ops, 2)


def test_offloaded_norms_are_computed_with_what_stands_around_them():
    """Their weights are there for the time of a call only, and that call is made."""
    from accelerate import cpu_offload

    model, arguments = tiny.load("z-image", torch.bfloat16), tiny.inputs("z-image", 1, torch.bfloat16)
    expected = tiny.run(model, arguments)
    cpu_offload(patch_model(model, strict=True), torch.device("cpu"))
    before = kernels.counts()
    assert torch.equal(tiny.run(model, arguments), expected)
    op = "norm_scale_residual_norm_scale_shift"
    assert kernels.counts()[op, "reference"] - before[op, "reference"] == 4
