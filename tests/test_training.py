"""Training through patched models: the gradients and losses of unpatched ones, on the GPU through
fused kernels.
"""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import tiny
from support.model_checks import DEVICES, moved
from support.slow import slow_but
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditnorm import kernels
from ditnorm.functional import path
from ditnorm.ops.autograd import Gradients
from ditnorm.ops.gradients import GRADIENTS
from ditnorm.ops.options import NORMS
from ditnorm.patching import patch_model

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
MODELS = (
    "qwen-image",
    "qwen-image-2.1",
    "wan-t2v",
    "wan-ti2v",
    "hunyuan-video",
    "hunyuan-video-token-replace",
    "flux",
    "flux2",
    "z-image",
    "lumina2",
)
BACKWARD = [op for op in kernels.OPS if op.endswith("_backward")]


def with_lora(name: str, dtype: torch.dtype, device: str, checkpointing: bool) -> Any:
    model: Any = tiny.load(name, dtype).to(device).requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False))
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def output_of(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return tiny.joined(model(**arguments, return_dict=False))


def gradients(model: nn.Module, arguments: dict[str, Any], attention: tuple[SDPBackend, ...] = (SDPBackend.MATH,)) -> dict[str, Tensor]:
    """Of what is trained, and the output.

    Attention in plain operations: the others' gradients depend on the order of threads.
    """
    model.zero_grad()
    with sdpa_kernel(list(attention)):
        output = output_of(model, arguments)
        output.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"output": output.detach()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_lora_gets_the_gradients_of_the_unpatched_model(name: str, dtype: torch.dtype, device: str, checkpointing: bool) -> None:
    model, arguments = with_lora(name, dtype, device, checkpointing), moved(tiny.inputs(name, 2, dtype), device)
    expected = gradients(model, arguments)
    patch_model(model, strict=True)
    before = kernels.counts()
    got = gradients(model, arguments)
    calls = {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]}
    assert expected.keys() == got.keys()
    assert any("lora" in key for key in got)
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []
    if device == "cuda" and kernels.unavailable is None:
        assert not [op for op, path in calls if path == "reference" and op in GRADIENTS]
        assert any(op in BACKWARD for op, _ in calls)


OF_SEVERAL_ROWS = {
    "wan-ti2v": ("scale_shift_table",),
    "wan-ti2v-text": ("scale_shift_table",),
    "qwen-image-2.1": ("modulation.1.weight", "norm_out.linear.weight", "time_text_embed"),
    "qwen-image-2.1-edit": ("modulation.1.weight", "norm_out.linear.weight", "time_text_embed"),
}
"""Model -> parameters whose gradients are sums over tokens, or over rows that tokens choose from,
in another order than upstream's.
"""


@pytest.mark.parametrize("name", slow_but(("flux", "qwen-image", "sd3.5-controlnet", "wan-t2v", "z-image-small"), tiny.MODELS))
def test_all_weights_get_the_gradients_of_the_unpatched_model(name: str) -> None:
    """Of ControlNets, too, each of whose residuals is read three times: the gradient of the stream
    is the sum of all, in upstream's order.

    The product of query and key in plain operations has other bits for other layouts.
    """
    model, arguments = tiny.load(name, torch.float32), tiny.inputs(name, 2, torch.float32)
    attention = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    expected = gradients(model, arguments, attention)
    got = gradients(patch_model(model), arguments, attention)
    assert expected.keys() == got.keys()
    left = OF_SEVERAL_ROWS.get(name, ())
    differing = [key for key in expected if not torch.equal(got[key], expected[key])]
    assert [key for key in differing if not any(part in key for part in left)] == []


class OfDiffusersNorm:
    """The gradients of a site, where its norm is diffusers' ``RMSNorm``."""

    def __init__(self, gradients: Gradients) -> None:
        self.gradients = gradients
        self.calls = 0

    def call(self, kernel: Any, tensors: tuple[Any, ...], codes: tuple[Any, ...]) -> Any:
        if len(codes) == 3 and codes[0] != NORMS.index("diffusers_rms"):
            return None
        self.calls += 1
        return self.gradients.call(kernel, tensors, codes)


@pytest.mark.parametrize("trained", ["LoRA", "all weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["z-image", "lumina2", "ltx2"])
def test_gradients_of_a_stream_are_added_in_upstreams_order(
    name: str, dtype: torch.dtype, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown without kernels, by the ops' references: these have the bits of autograd, but for
    torch's norms.
    """
    model: Any = with_lora(name, dtype, "cpu", False) if trained == "LoRA" else tiny.load(name, dtype).train()
    arguments = tiny.inputs(name, 2, dtype)
    expected = gradients(model, arguments)
    names = ("norm_scale_shift", "scale_residual_norm_scale_shift", "scale_residual", "norm_scale_residual")
    served = {op: OfDiffusersNorm(GRADIENTS[op]) for op in (*names, "norm_scale_residual_norm_scale_shift")}
    monkeypatch.setattr(path, "GRADIENTS", served)
    monkeypatch.setattr(kernels, "serves", lambda x: True)
    got = gradients(patch_model(model, strict=True), arguments)
    assert sum(of_norm.calls for of_norm in served.values()) > 2
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(got[key], expected[key])] == []


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["eager", "single"])
@pytest.mark.parametrize("name", MODELS)
def test_all_weights_get_gradients_on_a_gpu(name: str, rounding: str) -> None:
    """Sums over tokens aren't taken in upstream's order everywhere: in float32 that shows in the
    last digits. A gradient that is zero but for rounding, as that of a key's bias is, is held
    against the whole model's.
    """
    model, arguments = tiny.load(name, torch.float32).to("cuda"), moved(tiny.inputs(name, 2, torch.float32), "cuda")
    expected = gradients(model, arguments)
    got = gradients(patch_model(model, strict=True, rounding=rounding), arguments)
    assert expected.keys() == got.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        assert (got[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, key


@pytest.mark.parametrize("rounding", ["eager", "single"])
@pytest.mark.parametrize("name", MODELS)
def test_a_short_training_has_the_losses_of_the_unpatched_model(name: str, rounding: str) -> None:
    def losses(patched: bool) -> list[float]:
        model = with_lora(name, torch.float32, "cpu", checkpointing=False)
        if patched:
            patch_model(model, strict=True, rounding=rounding)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for step in range(4):
            output = output_of(model, tiny.inputs(name, 2, torch.float32, seed=step))
            loss = output.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    unpatched, patched = losses(False), losses(True)
    if rounding == "eager":
        assert patched == unpatched
    else:
        assert patched == pytest.approx(unpatched, rel=1e-4)
