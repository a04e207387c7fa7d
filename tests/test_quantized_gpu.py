"""Quantised weights on a GPU, where torchao's kernels run: values, scales, products and whole
models, bit for bit against torchao's.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import quantised, tiny
from support.model_checks import moved
from support.quantised import LAWS
from torch import Tensor, nn

from ditnorm import functional, kernels, patch_model, report, verify
from ditnorm.fused.bfl_linear import BFLLinear
from ditnorm.fused.quantized_linear import QuantizedLinear
from ditnorm.ops import quantization, reference_quantize
from ditnorm.ops.calls_quantize import DequantizeProduct
from ditnorm.ops.quantization import FLOAT8_ROW, FLOAT8_ROW_BFL, FLOAT8_TENSOR, INT8_ROW, Law
from ditnorm.swapping.generated import subclass
from ditnorm.swapping.hook_chains import set_class

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="float8 needs compute capability 8.9"
    ),
]

DEVICE = "cuda"
HALVES = (torch.bfloat16, torch.float16)
# Widths of models, of their MLPs, and others that take the kernel for all the rest.
SHAPES = (
    (1, 4096, 3072),
    (2, 333, 1536),
    (1, 500, 5120),
    (1, 300, 12288),
    (1, 77, 8960),
    (1, 40, 13824),
    (3, 15360),
    (2, 20000),
    (2, 9, 40),
    (5, 13),
)
# Of more than 2048 rows, which have kernels of their own, and of fewer.
MODULATED = (
    (1, 4096, 3072),
    (3, 701, 1536),
    (1, 2050, 5120),
    (1, 2051, 2048),
    (2, 1100, 2432),
    (2, 200, 1536),
    (1, 300, 5120),
    (1, 300, 2048),
    (1, 100, 4096),
    (1, 50, 6144),
    (2, 33, 1152),
)


def rows(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "plain") -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    x = (
        torch.randn(shape, generator=generator, device=DEVICE)
        * torch.randn(*shape[:-1], 1, generator=generator, device=DEVICE).mul(3).exp()
    )
    if kind == "zeros":
        x[..., 0, :] = 0
    if kind == "nan and inf":
        x.view(-1)[3], x.view(-1)[-2] = float("nan"), -float("inf")
    return x.to(dtype)


def differing(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> int:
    """Elements with other bits; NaN is NaN."""
    return sum(_differing(a, b) for a, b in zip(got, expected, strict=True))


def _differing(a: Tensor, b: Tensor) -> int:
    assert a.dtype is b.dtype
    a, b = a.reshape(-1), b.reshape(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.float().isnan() & b.float().isnan()
    return int(((a.view(bits) != b.view(bits)) & ~nan).sum())


def by_torchao(x: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    torchao = pytest.importorskip("torchao.quantization")
    if law is INT8_ROW:
        tensor = torchao.Int8Tensor.from_hp(x, torchao.PerRow())
    else:
        tensor = torchao.Float8Tensor.from_hp(x, granularity=torchao.PerRow() if law.per_row else torchao.PerTensor())
    return tensor.qdata.reshape(-1, x.shape[-1]), tensor.scale.reshape(-1, 1)


@pytest.fixture(autouse=True)
def _kernels_serve() -> Any:
    """Every op of ours runs in a kernel."""
    before = {op: n for (op, path), n in kernels.counts().items() if path == "reference"}
    yield
    assert {op: n for (op, path), n in kernels.counts().items() if path == "reference"} == before


@pytest.mark.parametrize("law", quantization.LAWS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_scales(law: Law, dtype: torch.dtype) -> None:
    for shape, kind in itertools.product(SHAPES, ("plain", "zeros", "nan and inf")):
        x = rows(shape, dtype, kind)
        got = functional.quantize(x, law)
        assert differing(got[:2], quantization.quantize(x, law)) == 0, (shape, kind)
        if law is not FLOAT8_ROW_BFL:
            assert differing(got[:2], by_torchao(x, law)) == 0, (shape, kind)
    strided = rows((2, 9, 3 * 512), dtype)[..., 512:1024]
    assert differing(functional.quantize(strided, law)[:2], quantization.quantize(strided, law)) == 0


@pytest.mark.parametrize("law", [FLOAT8_ROW, FLOAT8_TENSOR, INT8_ROW], ids=str)
def test_every_bfloat16(law: Law) -> None:
    """Divided by many scales."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for exponent in torch.linspace(-125, 125, 26).tolist():
        amax = (torch.rand(1, device=DEVICE) + 1).mul(2.0**exponent).to(torch.bfloat16)
        x = every[every.abs() <= amax]
        x = torch.cat([x, amax.expand(-x.numel() % 4088)]).view(-1, 4088)
        x = torch.cat([amax.expand(x.shape[0], 8), x], 1)
        assert differing(functional.quantize(x, law)[:2], quantization.quantize(x, law)) == 0, exponent


@pytest.mark.parametrize("law", quantization.LAWS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_gelu(law: Law, dtype: torch.dtype) -> None:
    for shape in ((1, 1024, 12288), (2, 700, 8960), (1, 1030, 13824), (1, 1300, 2056), (2, 300, 8960), (1, 20, 14336), (3, 77)):
        x = (2 * rows(shape, torch.float32)).clamp(-30, 30).to(dtype)
        got = functional.gelu_quantize(x, law)
        assert differing(got[:2], quantization.quantize(F.gelu(x, approximate="tanh"), law)) == 0, shape


@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_of_every_number(dtype: torch.dtype) -> None:
    """One number a row, so that its scale tells what GELU made of it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype)[:, None].repeat(1, 8)
    assert (
        differing(functional.gelu_quantize(every, FLOAT8_ROW)[:2], quantization.quantize(F.gelu(every, approximate="tanh"), FLOAT8_ROW))
        == 0
    )


def test_gelu_of_every_number_in_wide_rows() -> None:
    """Which a table has."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(torch.bfloat16)[:, None].repeat(1, 2056)
    expected = quantization.quantize(F.gelu(every, approximate="tanh"), FLOAT8_ROW)
    assert differing(functional.gelu_quantize(every, FLOAT8_ROW)[:2], expected) == 0


@pytest.mark.parametrize("law", quantization.LAWS, ids=str)
@pytest.mark.parametrize("rounding", ["eager", "single"])
def test_activations_and_what_stands_beside_them(law: Law, rounding: str) -> None:
    """In one kernel or two."""
    for tokens, beside, width in ((1100, 3072, 12288), (1030, 6144, 18432), (3000, 0, 9216), (700, 0, 10240), (5, 3, 10), (3, 16, 40000)):
        both = rows((2, tokens, beside + 2 * width), torch.bfloat16).clamp(-9, 9)
        gate, value, left = both.split([width, width, beside], dim=-1)
        if beside:
            expected = quantization.quantize(functional.gelu(value, left, rounding=rounding), law)
            assert differing(functional.gelu_quantize(value, law, left)[:2], expected) == 0, (beside, width)
        else:
            left = None
        expected = quantization.quantize(functional.swiglu(gate, value, left, rounding=rounding), law)
        assert differing(functional.swiglu_quantize(gate, value, law, left, rounding=rounding)[:2], expected) == 0, (beside, width)


def test_y_beside_what_it_is_quantised_to() -> None:
    for law, shape, case in itertools.product(quantization.LAWS, MODULATED, CASES):
        x, residual, tables = (
            rows(shape, torch.bfloat16),
            rows(shape, torch.bfloat16),
            {"norm": "fp32_layer" if "affine" in case else "layer"},
        )
        options: dict[str, Any] = modulations(shape, case, False) | tables | {"eps": 1e-6, "rounding": "eager"}
        y, beside = functional.norm_scale_shift_and_quantize(x, law=law, **options)
        assert differing((y, *beside[:2]), (functional.norm_scale_shift(x, **options), *quantization.quantize(y, law))) == 0, (
            law,
            shape,
            case,
        )
        options = modulations(shape, case, True) | tables | {"eps": 1e-6, "rounding": "eager"}
        y, beside, r = functional.scale_residual_norm_scale_shift_and_quantize(residual, x, law=law, **options)
        expected = functional.scale_residual_norm_scale_shift(residual, x, **options)
        assert differing((y, r, *beside[:2]), (*expected, *quantization.quantize(y, law))) == 0, (law, shape, case)


Modulations = dict[str, Any]


def modulations(shape: tuple[int, ...], case: str, gated: bool) -> Modulations:
    batch, tokens, width = shape
    names = ("scale", "shift", "gate") if gated else ("scale", "shift")
    if case == "none":
        return {}
    per_token = rows((batch, tokens if case == "per token" else 1, 3 * width), torch.float32).clamp(-3, 3)
    chunks = per_token.to(torch.float32 if case == "float32" else torch.bfloat16).chunk(3, dim=-1)
    found: Modulations = dict(zip(names, chunks, strict=False))
    if case in ("tables", "per token"):
        found |= {f"{name}_table": rows((width,), torch.float32).clamp(-3, 3) for name in names}
    if case in ("affine", "tables and affine"):
        found |= {"weight": rows((width,), torch.bfloat16).clamp(-3, 3), "bias": rows((width,), torch.bfloat16).clamp(-3, 3)}
    if case == "tables and affine":
        found = {"gate": found.get("gate"), "gate_table": rows((width,), torch.float32), "weight": found["weight"], "bias": found["bias"]}
        found = found if gated else {"weight": found["weight"], "bias": found["bias"]}
    return found


CASES = ("plain", "tables", "per token", "float32", "affine", "tables and affine", "none")


@pytest.mark.parametrize("law", quantization.LAWS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rounding", ["eager", "single"])
def test_norm_sites(law: Law, gated: bool, rounding: str) -> None:
    """Quantised behind the norm, in one kernel or two, as quantised by ATen after the op that
    stands there otherwise.
    """
    for shape, case in itertools.product(MODULATED, CASES):
        x, residual = rows(shape, torch.bfloat16), rows(shape, torch.bfloat16)
        options = modulations(shape, case, gated) | {
            "norm": "fp32_layer" if "affine" in case else "layer",
            "eps": 1e-6,
            "rounding": rounding,
        }
        if gated:
            y, r = functional.scale_residual_norm_scale_shift(residual, x, **options)
            got, got_r = functional.scale_residual_norm_scale_shift_quantize(residual, x, law=law, **options)
            assert differing((got_r,), (r,)) == 0, (shape, case)
        else:
            y = functional.norm_scale_shift(x, **options)
            got = functional.norm_scale_shift_quantize(x, law=law, **options)
        assert differing(got[:2], quantization.quantize(y, law)) == 0, (shape, case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
def test_int8_products_are_scaled(dtype: torch.dtype, biased: bool) -> None:
    for n_rows, width in ((4096, 3072), (37, 1032), (1, 8)):
        product = torch.randint(-(2**22), 2**22, (n_rows, width), dtype=torch.int32, device=DEVICE)
        scale, weight_scale = 1e-3 * torch.rand(n_rows, 1, device=DEVICE), 1e-2 * torch.rand(width, 1, device=DEVICE)
        bias = torch.randn(width, device=DEVICE).to(dtype) if biased else None
        got = functional.dequantize_product(product, scale, weight_scale, bias, dtype)
        expected = reference_quantize.dequantize_product(DequantizeProduct(product, scale, weight_scale, bias, dtype))
        assert differing((got,), (expected,)) == 0


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linears(law: Law, bias: bool) -> None:
    """As ``quantize_`` makes them."""
    torchao = pytest.importorskip("torchao.quantization")
    for n, k in ((3072, 3072), (12288, 3072), (3072, 12288), (1536, 8960), (64, 48)):
        linear = nn.Linear(k, n, bias=bias, dtype=torch.bfloat16, device=DEVICE)
        torchao.quantize_(linear, quantised.config(law))
        twin = copy.deepcopy(linear)
        set_class(twin, subclass(QuantizedLinear, nn.Linear, "eager"))
        for shape in ((1, 4096, k), (2, 77, k), (1, k), (20, k)):
            x = rows(shape, torch.bfloat16)
            with torch.no_grad():
                got, expected = outcome(twin, x), outcome(linear, x)
            if isinstance(expected, Exception):  # cuBLAS has no kernel for some of one row
                assert type(got) is type(expected), (n, k, shape)
            else:
                assert differing((got,), (expected,)) == 0, (n, k, shape)


def outcome(linear: nn.Module, x: Tensor) -> Any:
    try:
        return linear(x)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_black_forest_labs(bias: bool) -> None:
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    for n, k in ((3072, 3072), (12288, 3072), (3072, 15360), (64, 48)):
        layer = quantised.bfl_linear(nn.Linear(k, n, bias=bias, dtype=torch.bfloat16, device=DEVICE))
        twin = copy.deepcopy(layer)
        set_class(twin, subclass(BFLLinear, utils.BFLFP8RLinear, "eager"))
        for shape in ((1, 4096, k), (2, 77, k), (20, k)):
            x = rows(shape, torch.bfloat16)
            with torch.no_grad():
                assert differing((twin(x),), (layer(x),)) == 0, (n, k, shape)


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma", "qwen-image", "z-image"])
def test_models_of_black_forest_labs_checkpoints(name: str) -> None:
    model = quantised.quantise_bfl(tiny.load(name, torch.bfloat16).to(DEVICE), lambda path: "blocks." in path and "refiner" not in path)
    arguments = moved(tiny.inputs(name, 2, torch.bfloat16), DEVICE)
    expected = tiny.run(model, arguments)
    patch_model(model, strict=True)
    assert differing((tiny.run(model, arguments),), (expected,)) == 0
    assert not any(found.differing for found in verify(model, strict=True).values())


@pytest.mark.parametrize("kind", ["random", "constant", "large"])
def test_int8_linears_of_few_rows(kind: str) -> None:
    """Of which torchao multiplies float32 matrices. ``"large"``: sums that float32 has no digits
    for.
    """
    torchao = pytest.importorskip("torchao.quantization")
    for n, k in ((18432, 3072), (64, 4096), (9216, 3072)):
        linear = nn.Linear(k, n, dtype=torch.bfloat16, device=DEVICE)
        if kind == "random":
            linear.weight.data.normal_(std=0.02)
        elif kind == "constant":
            linear.weight.data.fill_(0.02)
        torchao.quantize_(linear, quantised.config(INT8_ROW))
        if kind == "large":
            linear.weight.qdata.random_(64, 128)
        twin = copy.deepcopy(linear)
        set_class(twin, subclass(QuantizedLinear, nn.Linear, "eager"))
        for n_rows in (1, 2, 7, 16, 17):
            x = rows((n_rows, k), torch.bfloat16)
            if kind != "random":
                x = x.abs().clamp(min=0.7 * x.abs().max().item())
            with torch.no_grad():
                assert differing((twin(x),), (linear(x),)) == 0, (n, k, n_rows)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_models(name: str, law: Law) -> None:
    model = tiny.load(name, torch.bfloat16).to(DEVICE)
    quantised.quantise(model, law, lambda path: "blocks." in path and "refiner" not in path and "controlnet_" not in path)
    arguments = moved(tiny.inputs(name, 2, torch.bfloat16), DEVICE)
    try:
        expected = tiny.run(model, arguments)
    except AssertionError as error:  # torchao takes a weight of 128 x 128 with one scale for one that is scaled in blocks
        pytest.skip(f"upstream fails: {error}")
    patch_model(model)
    assert differing((tiny.run(model, arguments),), (expected,)) == 0
    fused = sum(isinstance(m, QuantizedLinear) for m in model.modules())
    assert fused == sum(type(m.weight).__module__.startswith("torchao") for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_verification_passes(law: Law) -> None:
    model = tiny.load("qwen-image", torch.bfloat16).to(DEVICE)
    quantised.quantise(model, law, lambda path: "blocks." in path)
    patch_model(model, strict=True)
    assert not any(found.differing for found in verify(model, strict=True).values())
    assert f"quantised     {law}" in str(report(model))


def test_a_cuda_graph_replays_it() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(512, 512, dtype=torch.bfloat16, device=DEVICE)
    torchao.quantize_(linear, quantised.config(FLOAT8_ROW))
    set_class(linear, subclass(QuantizedLinear, nn.Linear, "eager"))
    x = rows((64, 512), torch.bfloat16)
    with torch.no_grad():
        expected = linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        x.mul_(2)
        doubled = linear(x)
        graph.replay()
    assert differing((y,), (doubled,)) == 0
    assert not torch.equal(doubled, expected)


def host_microseconds(call: Callable[[], object]) -> float:
    """Of one call, the device far behind."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        import time

        start = time.perf_counter()
        for _ in range(100):
            call()
        best = min(best, (time.perf_counter() - start) / 100)
        torch.cuda.synchronize()
    return best * 1e6


def test_the_host_cost_of_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a layer with a bias in inference mode, called as a module: beside ``nn.Linear`` in
    bfloat16, called so too, and ``F.linear`` alone, each of the same rows and of them as a stream
    [1, rows, D]. Printed, not judged: other processes share the host.
    """
    torchao = pytest.importorskip("torchao.quantization")
    plain = nn.Linear(512, 512, dtype=torch.bfloat16, device=DEVICE).requires_grad_(False)
    with torch.inference_mode(), capsys.disabled():
        for x in (rows((64, 512), torch.bfloat16), rows((1, 64, 512), torch.bfloat16)):
            function, module = host_microseconds(lambda x=x: F.linear(x, plain.weight, plain.bias)), host_microseconds(lambda x=x: plain(x))
            print(f"\n{list(x.shape)}: F.linear {function:.1f}, nn.Linear {module:.1f} us")
            for law in LAWS:
                linear = copy.deepcopy(plain)
                torchao.quantize_(linear, quantised.config(law))
                torchaos = host_microseconds(lambda linear=linear, x=x: linear(x))
                set_class(linear, subclass(QuantizedLinear, nn.Linear, "eager"))
                shared = functional.quantize(x, law)
                of_quantised = host_microseconds(lambda linear=linear, shared=shared: linear(shared))
                whole = host_microseconds(lambda linear=linear, x=x: linear(x))
                ratios = f"{whole / module:.2f} times nn.Linear, {of_quantised / module:.2f} of a quantised activation"
                print(f"{law}: torchao {torchaos:.1f}, fused {whole:.1f}, of a quantised activation {of_quantised:.1f} us: {ratios}")


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_pieces_of_memory_that_a_quantised_activation_takes(law: Law) -> None:
    """Two, for values and for scales: another would cost the host a microsecond and more in each
    layer. A norm in front takes a third at most, for what it makes.
    """
    x = rows((64, 512), torch.bfloat16)

    def pieces(call: Callable[[], object]) -> int:
        call()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        return int(torch.cuda.memory_stats()["allocation.all.allocated"]) - before

    assert pieces(lambda: functional.quantize(x, law)) == 2
    assert pieces(lambda: functional.norm_scale_shift_quantize(x, law=law, eps=1e-6, rounding="eager")) <= 3


def test_the_kernels_that_one_scale_for_all_takes() -> None:
    """One where there are few elements; behind a norm its own and another."""

    def launched(call: Callable[[], object]) -> int:
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sum("ditnorm::" in event.name and event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    options: dict[str, Any] = {"law": FLOAT8_TENSOR, "eps": 1e-6, "rounding": "eager"}
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    for shape, few in (((1, 3072), True), ((64, 512), True), ((100, 3072), clusters), ((4096, 3072), False)):
        x = rows(shape, torch.bfloat16)
        assert launched(lambda x=x: functional.quantize(x, FLOAT8_TENSOR)) == (1 if few else 2)
        assert launched(lambda x=x: functional.norm_scale_shift_quantize(x, **options)) == (2 if shape[0] <= 1024 else 3)
