"""Quantised weights: through ``from_pretrained`` where that needs no hub, else by hand; a layer
that returns another dtype.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from support import quantised, tiny
from torch import Tensor, nn

from ditnorm import patch_model
from ditnorm.fused.bfl_linear import quantized_body
from ditnorm.fused.quantized_linear import QuantizedLinear
from ditnorm.ops.quantization import FLOAT8_ROW, FLOAT8_ROW_BFL, FLOAT8_TENSOR, INT8_ROW, Law
from ditnorm.swapping import generated

from . import feature
from .feature import DEVICE, DTYPE, FAMILIES, Feature, Upstream, its_output, weights_at_rest, without
from .offload import blocks_of, inside_blocks


class Int8Linear(nn.Linear):
    """A user's quantised layer: int8 weights, inputs of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.float().abs().amax() / 127
        weight = (self.weight / scale).round().clamp(-127, 127) * scale
        return F.linear(x.to(DTYPE), weight.to(DTYPE), None if self.bias is None else self.bias.to(DTYPE))


class Float32Int8Linear(Int8Linear):
    """One that returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def _returns_float32(model: nn.Module, folder: Path) -> nn.Module:
    """The last layer of every attention and feed-forward returns float32, so the residual stream is
    promoted.
    """
    inside = inside_blocks(model)
    for name, linear in model.named_modules():
        if type(linear) is nn.Linear:
            last = name in inside and name.endswith(_LAST)
            linear.__class__ = Float32Int8Linear if last else Int8Linear
    return model


_LAST = ("to_out.0", "to_out", "to_add_out", "net.2", "proj_out", "linear_out", "w2", "linear_2")


_WIDER: dict[str, dict[str, Any]] = {
    "Wan": {"attention_head_dim": 16},
    "HunyuanVideo": {"attention_head_dim": 16, "rope_axes_dim": (4, 4, 8)},
}
"""GPUs multiply float8 matrices of which the sizes are multiples of 16."""


def load(family: str) -> Any:
    """The tiny model, of a width that suits every matrix product."""
    return _load(family) if family in _WIDER else feature.load(family)


def _load(family: str) -> Any:
    return copy.deepcopy(_made(family)).to(DEVICE)


@functools.cache
def _made(family: str) -> Any:
    model = tiny.MODELS[FAMILIES[family]]
    torch.manual_seed(0)
    made = getattr(diffusers, model.cls)(**model.config | _WIDER[family])
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made.to(DTYPE).eval()


def unfused(model: nn.Module, law: Law) -> list[str]:
    """The linear layers of the blocks that quantise activations, and not fused and by ``law``. A
    model has some.
    """
    bodies = {name: (m, quantized_body(m)) for name, m in inside_blocks(model).items() if isinstance(m, nn.Linear)}
    quantising = {name: (m, body) for name, (m, body) in bodies.items() if body is not None}
    assert quantising
    return [name for name, (m, body) in quantising.items() if not isinstance(m, QuantizedLinear) or body.operand_in(m).law is not law]


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [m for block in blocks_of(model) for m in block.modules() if type(m) is nn.Linear]


def _from_pretrained(config: Callable[[], Any]) -> Callable[[Any, Path], Any]:
    """Saves the model and loads it quantised; a loaded model knows nothing of the patch, so it is
    patched if the saved one was.
    """

    def apply(model: Any, folder: Path) -> Any:
        model.save_pretrained(folder)
        device_map = {"device_map": DEVICE} if DEVICE == "cuda" else {}
        loaded = type(model).from_pretrained(folder, torch_dtype=DTYPE, quantization_config=config(), **device_map).eval()
        return patch_model(loaded) if any(generated.origin_of(type(m)) for m in model.modules()) else loaded

    return apply


def _torchao(config: str, **how: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torchao.quantization

        return diffusers.TorchAoConfig(getattr(torchao.quantization, config)(), **how)

    return make


def _saved_quantised(model: Any, folder: Path) -> Any:
    """Quantised while it is loaded, saved so, and loaded again."""
    loaded = _from_pretrained(_torchao("Int8DynamicActivationInt8WeightConfig"))(model, folder)
    loaded.save_pretrained(folder / "quantised", safe_serialization=False)
    again = type(model).from_pretrained(folder / "quantised", torch_dtype=DTYPE, use_safetensors=False).to(DEVICE).eval()
    return patch_model(again) if any(generated.origin_of(type(m)) for m in model.modules()) else again


def _bfl(model: nn.Module, folder: Path) -> nn.Module:
    inside = inside_blocks(model)
    quantised.quantise_bfl(model, lambda name: name in inside)
    return patch_model(model) if any(generated.origin_of(type(m)) for m in model.modules()) else model


def _torchao_by_hand(law: Law) -> Callable[[nn.Module, Path], nn.Module]:
    """Weights and activations of the blocks, before or after patching; patched again, so that the
    linear layers are fused too. With torchao's ``quantize_``, which asks for a GPU for float8.
    """

    def apply(model: nn.Module, folder: Path) -> nn.Module:
        inside = inside_blocks(model)
        if law is INT8_ROW or DEVICE == "cuda":
            import torchao.quantization

            torchao.quantization.quantize_(model, quantised.config(law), lambda m, name: name in inside and quantised.suits(m, law))
        else:
            quantised.quantise(model, law, lambda name: name in inside)
        return patch_model(model) if any(generated.origin_of(type(m)) for m in model.modules()) else model

    return apply


def _quanto_by_hand(model: nn.Module, folder: Path) -> nn.Module:
    import optimum.quanto

    optimum.quanto.quantize(model, weights=optimum.quanto.qfloat8)
    optimum.quanto.freeze(model)
    return model


def _gguf(model: nn.Module, folder: Path) -> nn.Module:
    """Every linear layer of the blocks in Q8_0 where its width is a multiple of that format's 32,
    else in bf16.
    """
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for linear in _linears(model):
        kind = gguf.GGMLQuantizationType.Q8_0 if linear.in_features % 32 == 0 else gguf.GGMLQuantizationType.BF16
        data = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().float().cpu().numpy(), kind)).to(DEVICE)
        linear.__class__ = GGUFLinear
        linear.compute_dtype = DTYPE  # type: ignore[assignment]
        linear.weight = GGUFParameter(data, quant_type=kind)
    return model


def _gguf_file(model: Any, folder: Path) -> Any:
    """Saves the model as a GGUF file and loads that, with a configuration that is a file too;
    patched if the saved one was.
    """
    import gguf

    model.save_config(folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "tiny")
    quantised = {f"{name}.weight" for name, m in inside_blocks(model).items() if type(m) is nn.Linear}
    for name, t in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.BF16 if name in quantised else gguf.GGMLQuantizationType.F32
        if name in quantised and t.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(t.float().cpu().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = diffusers.GGUFQuantizationConfig(compute_dtype=DTYPE)
    loaded = type(model).from_single_file(str(folder / "model.gguf"), config=str(folder), quantization_config=config, torch_dtype=DTYPE)
    loaded = loaded.to(DEVICE).eval()
    return patch_model(loaded) if any(generated.origin_of(type(m)) for m in model.modules()) else loaded


def _bitsandbytes(**how: Any) -> Callable[[], Any]:
    return lambda: diffusers.BitsAndBytesConfig(**how)


NAN = "torchao makes NaN of the zero tokens of Z-Image and Lumina 2"
FAMILIES_OF = dict.fromkeys(quantised.LAWS, tuple(FAMILIES)) | {FLOAT8_ROW: without("Z-Image", "Lumina2")}

FEATURES = (
    Feature("layers that return fp32 into a bf16 stream", _returns_float32, its_output),
    Feature("`TorchAoConfig`, int8 weights", _from_pretrained(_torchao("Int8WeightOnlyConfig")), its_output, needs=("torchao",)),
    *(
        Feature(
            f"torchao {law} weights and activations, by hand",
            _torchao_by_hand(law),
            its_output,
            load=load,
            needs=("torchao",),
            fused="any",
            law=law,
            families=FAMILIES_OF[law],
            note=NAN if law is FLOAT8_ROW else "",
        )
        for law in quantised.LAWS
    ),
    Feature(
        "`TorchAoConfig`, int8 weights and activations",
        _from_pretrained(_torchao("Int8DynamicActivationInt8WeightConfig")),
        its_output,
        load=load,
        needs=("torchao",),
        fused="any",
        law=INT8_ROW,
    ),
    Feature(
        "`TorchAoConfig`, int8 weights and activations, `modules_to_not_convert`",
        _from_pretrained(_torchao("Int8DynamicActivationInt8WeightConfig", modules_to_not_convert=["to_k", "to_v", "net.2"])),
        its_output,
        load=load,
        needs=("torchao",),
        fused="any",
        law=INT8_ROW,
        in_turn=True,
    ),
    Feature(
        "int8 weights and activations, saved quantised and loaded",
        _saved_quantised,
        its_output,
        load=load,
        needs=("torchao",),
        fused="any",
        law=INT8_ROW,
        in_turn=True,
    ),
    Feature(
        "`BFLFP8RLinear`, the fp8 layers of Black Forest Labs' checkpoints, by hand",
        _bfl,
        its_output,
        load=load,
        needs=("diffusers.quantizers.bfl",),
        fused="any",
        law=FLOAT8_ROW_BFL,
        in_turn=True,
        note="on the CPU diffusers multiplies by what such a weight stands for",
    ),
    Feature(
        "`TorchAoConfig`, fp8 weights and activations",
        _from_pretrained(_torchao("Float8DynamicActivationFloat8WeightConfig")),
        its_output,
        load=load,
        needs=("torchao",),
        fused="any",
        law=FLOAT8_TENSOR,
        upstream={"LTX-2": Upstream("must be 1x128 scaled", "torchao takes 128 x 128 weights with one scale for blocks")},
        gpus=1,
    ),
    Feature("`TorchAoConfig`, fp8 weights", _from_pretrained(_torchao("Float8WeightOnlyConfig")), its_output, needs=("torchao",)),
    Feature(
        "`QuantoConfig`, fp8 weights",
        _from_pretrained(lambda: diffusers.QuantoConfig(weights_dtype="float8")),
        its_output,
        needs=("optimum.quanto",),
    ),
    Feature("optimum-quanto fp8 weights, by hand", _quanto_by_hand, its_output, needs=("optimum.quanto",)),
    Feature(
        "GGUF layers, by hand",
        _gguf,
        its_output,
        needs=("gguf",),
        families=("Qwen-Image", "HunyuanVideo"),
        note="of the tiny Wan's widths none is a multiple of the format's 32",
    ),
    Feature("`from_single_file` of a GGUF file, `GGUFQuantizationConfig`", _gguf_file, weights_at_rest, needs=("gguf",)),
    Feature(
        "`BitsAndBytesConfig`, 8 bit",
        _from_pretrained(_bitsandbytes(load_in_8bit=True)),
        its_output,
        needs=("bitsandbytes",),
        gpus=1,
    ),
    Feature(
        "`BitsAndBytesConfig`, 4 bit (NF4)",
        _from_pretrained(_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)),
        its_output,
        needs=("bitsandbytes",),
        gpus=1,
    ),
)
