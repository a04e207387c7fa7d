"""The quantisers' laws and ops, bit for bit against torchao and diffusers; NaN counts as equal to
NaN.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import compiled_only
from support.quantised import rows
from torch import Tensor

from ditnorm import functional, kernels
from ditnorm.ops import quantization, reference_quantize
from ditnorm.ops.calls_quantize import DequantizeProduct
from ditnorm.ops.quantization import FLOAT8_ROW, FLOAT8_ROW_BFL, FLOAT8_TENSOR, INT8_ROW, LAWS, Law

HALVES = (torch.bfloat16, torch.float16)
SHAPES = ((3, 7, 64), (5, 8), (1, 33, 3072), (2, 3, 1536), (2, 20000), (2, 3, 13), (1, 1, 8), (2, 5, 5), (1, 40000))
RECIPROCALS = {INT8_ROW: 1 / 127.5}


KINDS = ("plain", "zeros", "nan", "inf", "any bits")


def equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Bit for bit, but for the sign and the digits of NaN, which depend on the processor."""
    values = [t.view(torch.uint8) if t.dtype is torch.int8 else _one_nan(t) for t in (got[0], expected[0])]
    return torch.equal(*values) and torch.equal(got[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))


def _one_nan(values: Tensor) -> Tensor:
    return values.view(torch.uint8).masked_fill(values.float().isnan(), 0x7F)


def by_torchao(x: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    torchao = pytest.importorskip("torchao.quantization")
    if law is INT8_ROW:
        tensor = torchao.Int8Tensor.from_hp(x, torchao.PerRow())
    else:
        tensor = torchao.Float8Tensor.from_hp(x, granularity=torchao.PerRow() if law.per_row else torchao.PerTensor())
    return tensor.qdata.reshape(-1, x.shape[-1]), tensor.scale.reshape(-1, 1)


@pytest.mark.parametrize("law", [FLOAT8_ROW, FLOAT8_TENSOR, INT8_ROW], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_laws_are_torchaos(law: Law, dtype: torch.dtype) -> None:
    for shape, kind in itertools.product(SHAPES, KINDS):
        x = rows(shape, dtype, kind)
        assert equal(quantization.quantize(x, law), by_torchao(x, law)), (shape, kind)
    strided = rows((2, 9, 192), dtype)[..., 64:128]
    assert equal(quantization.quantize(strided, law), by_torchao(strided.contiguous(), law))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_law_of_bfl_is_diffusers(dtype: torch.dtype) -> None:
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    x = rows((33, 64), dtype, "zeros")
    values, scale = quantization.quantize(x, FLOAT8_ROW_BFL)
    expected = utils.quantize_fp8r(x)
    assert equal((values, scale), (expected[0], expected[1][:, None]))


def as_on_a_gpu(x: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    """The law where ATen multiplies by the reciprocal of the divisor, as it does on CUDA."""
    flat = x.reshape(-1, x.shape[-1])
    amax = flat.abs().amax(-1, keepdim=True) if law.per_row else flat.abs().amax().view(1, 1)
    scale = amax.float() * torch.tensor(RECIPROCALS.get(law, 1 / 448), dtype=torch.float32)
    if law is FLOAT8_ROW_BFL:
        scale = scale.clamp(min=1e-12)
    else:
        scale = scale.to(x.dtype)
        scale = (scale.clamp(min=torch.finfo(torch.float32).eps) if law is INT8_ROW else scale).float()
    return law.round(flat, scale), scale


@pytest.mark.sanitize
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_op_follows_the_law(law: Law, dtype: torch.dtype, device: str) -> None:
    expected = quantization.quantize if kernels.path == "cuda" else as_on_a_gpu
    for shape, kind in itertools.product(SHAPES, KINDS):
        x = rows(shape, dtype, kind).to(device)
        got = functional.quantize(x, law)
        assert equal((got.values, got.scale), expected(x, law)), (shape, kind)
        assert got.shape == x.shape
        assert got.dtype is dtype
    strided = rows((2, 9, 192), dtype).to(device)[..., 64:128]
    got = functional.quantize(strided, law)
    assert equal((got.values, got.scale), expected(strided, law))
    transposed = rows((64, 9), dtype).to(device).t()
    assert equal(functional.quantize(transposed, law)[:2], expected(transposed, law))
    four = rows((2, 3, 5, 64), dtype).to(device)
    assert equal(functional.quantize(four, law)[:2], expected(four, law))


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_many_narrow_rows_follow_it_too(law: Law, dtype: torch.dtype, device: str) -> None:
    """Several of them share a block."""
    expected = quantization.quantize if kernels.path == "cuda" else as_on_a_gpu
    for shape in ((2, 1029, 1536), (2050, 64), (3, 683, 2048), (2049, 1000)):
        x = rows(shape, dtype)
        x[..., 7, :] = 0
        if law.per_row:
            x[..., 9, 3], x[..., -1, 5], x[..., 11, :] = float("nan"), float("inf"), rows(shape[-1:], dtype, "any bits")
        x = x.to(device)
        assert equal(functional.quantize(x, law)[:2], expected(x, law)), shape
    strided = rows((2053, 192), dtype).to(device)[:, 64:128]
    assert equal(functional.quantize(strided, law)[:2], expected(strided, law))


# Around what one block has, with GELU or without, and a cluster of blocks, one of them on the host.
# More are worth two kernels.
ONE_SCALE = {
    "cuda": ((1, 8), (1, 3072), (33, 496), (33, 504), (64, 512), (65, 512), (160, 2048), (161, 2048)),
    "cpu_sim": ((1, 8), (1, 3072), (33, 496), (33, 504), (64, 512), (65, 512), (80, 512), (81, 512)),
}


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_few_elements_with_one_scale_are_quantised_as_one_row(kind: str, dtype: torch.dtype, device: str) -> None:
    """By one kernel; by two where there are gaps between the rows."""
    expected = as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize
    for n_rows, width in ONE_SCALE[kernels.path]:
        x = rows((n_rows, width), dtype, kind)
        x[-1, -1] = 2 * x[x.isfinite()].abs().max()  # the last thread has the largest
        x = x.to(device)
        apart, unaligned = F.pad(x, (0, 8))[:, :width], F.pad(x.flatten(), (1, 0))[1:].view_as(x)
        got = functional.quantize(x, FLOAT8_TENSOR)
        assert equal(got[:2], expected(x, FLOAT8_TENSOR)), (n_rows, width)
        assert (got.scale.shape, got.values.shape) == ((1, 1), (n_rows, width))
        assert equal(functional.quantize(x[None], FLOAT8_TENSOR)[:2], got[:2])
        of_gelu = functional.gelu_quantize(x, FLOAT8_TENSOR)
        for other in (apart, unaligned):
            assert equal(functional.quantize(other, FLOAT8_TENSOR)[:2], got[:2]), (n_rows, width)
            assert equal(functional.gelu_quantize(other, FLOAT8_TENSOR)[:2], of_gelu[:2]), (n_rows, width)


@pytest.mark.sanitize
def test_every_quotient_is_rounded_once() -> None:
    """All bfloat16 numbers by many scales: the refined reciprocal gives what a division gives."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for exponent in torch.linspace(-120, 120, 25).tolist():
        amax = (torch.rand(1) + 1).mul(2.0**exponent).to(torch.bfloat16)
        x = every[every.abs() <= amax]
        x = torch.cat([amax, x, amax.new_zeros(-(x.numel() + 1) % 4096)]).view(-1, 4096)
        x = torch.cat([amax.expand(x.shape[0], 8), x], 1)
        assert equal(functional.quantize(x, FLOAT8_ROW)[:2], as_on_a_gpu(x, FLOAT8_ROW))


@pytest.mark.sanitize
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_before_it(law: Law, dtype: torch.dtype, device: str) -> None:
    for shape in ((2, 5, 512), (3, 4096), (2, 3, 13), (2, 12288)):
        x = (3 * torch.randn(shape)).to(dtype).to(device)
        got = functional.gelu_quantize(x, law)
        expected = (as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize)(F.gelu(x, approximate="tanh"), law)
        # Another library's tanh: now and then the last digit of GELU differs, which moves a value
        # to its neighbour, and rarely a scale.
        scales = (got.scale - expected[1]).abs() <= torch.finfo(dtype).eps * expected[1]
        assert scales.all()
        differing = got.values.view(torch.uint8) != expected[0].view(torch.uint8)
        assert differing.float().mean() < 0.01


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize("law", [FLOAT8_ROW, INT8_ROW], ids=str)
def test_gelu_of_many_rows_is_that_of_few(law: Law, device: str) -> None:
    """Kernels look it up in tables, of which wide rows have one with copies for lanes, and several
    rows a block.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for width in (2056, 4104, 8200):
        x = (3 * torch.randn(1027, width)).to(torch.bfloat16)
        x[::3] = every.repeat(width // 64)[: 343 * width].view(343, width).nan_to_num(0.0, 0.0, 0.0)
        x[::5] = every.nan_to_num(0.0, 0.0, 0.0)[torch.randint(2**16, (206, 1))]
        x[7, 5], x[8, 6], x[9] = float("nan"), -float("inf"), 0
        x[11], x[13] = x[11] * 2.0**-128, x[13] * 2.0**-64  # tiny, in part not normal; small
        x = x.to(device)
        whole = functional.gelu_quantize(x, law)
        parts = [functional.gelu_quantize(part, law) for part in x.split(512)]
        assert equal(whole[:2], (torch.cat([part.values for part in parts]), torch.cat([part.scale for part in parts])))
        assert equal(functional.gelu_quantize(x.view(13, 79, width), law)[:2], whole[:2])


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_before_one_scale(dtype: torch.dtype, device: str) -> None:
    """Where the largest number is large enough GELU's largest magnitude is that of it alone."""
    rows = 3 * torch.randn(5, 4096)
    rows[3] = 0
    infinite, negative, nan = (rows.clone() for _ in range(3))
    infinite[2, 5], negative[2, 5], nan[2, 5] = float("inf"), -float("inf"), float("nan")
    few = (rows, rows[:4].view(2, 2, -1)[:, :, :520], rows - 20, rows * 0.05, rows * 2.0**-20, rows * 0, infinite, negative, nan)
    # Many rows of bfloat16 are looked up in tables.
    narrow, *wide = (x.repeat(206, 1)[:1027] for x in (rows[:, :2056], rows, negative, rows * 2.0**-130))
    many = (narrow, wide[0].view(13, 79, -1), *wide[1:]) if dtype == torch.bfloat16 else ()
    for x in (*few, *many):
        x = x.to(dtype).to(device)
        expected = functional.quantize(functional.gelu(x, rounding="eager"), FLOAT8_TENSOR)
        assert equal(functional.gelu_quantize(x, FLOAT8_TENSOR)[:2], expected[:2])


@compiled_only
@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_grows_from_a_half_on_past_all_that_smaller_numbers_have(dtype: torch.dtype, device: str) -> None:
    """What the kernel that looks for the largest takes for granted."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].float().sort().values.to(dtype)
    results = functional.gelu(numbers[None].to(device), rounding="eager")[0].float().cpu()
    grows = numbers >= 0.5
    assert (results[grows].diff() >= 0).all()
    assert results[~grows].abs().max() <= results[grows][0]


@pytest.mark.sanitize
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_an_activation_and_what_stands_beside_it_are_quantised_as_one_row(law: Law, dtype: torch.dtype, device: str) -> None:
    """As of what the op writes otherwise, a part of a fused projection included."""
    expected = as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize
    for tokens, beside, width in ((5, 512, 2048), (3, 3072, 12288), (2, 6144, 18432), (2, 8, 24), (3, 3, 10), (2, 0, 1536), (1, 16, 40000)):
        gate, value, left = rows((2, tokens, beside + 2 * width), dtype).clamp(-9, 9).to(device).split([width, width, beside], dim=-1)
        left = None if beside == 0 else left
        if left is not None:
            y = functional.gelu(value, left)
            got = functional.gelu_quantize(value, law, left)
            assert equal(got[:2], expected(y, law)), (beside, width)
            assert got.shape == y.shape
        for rounding in ("eager", "single"):
            y = functional.swiglu(gate, value, left, rounding=rounding)
            got = functional.swiglu_quantize(gate, value, law, left, rounding=rounding)
            assert equal(got[:2], expected(y, law)), (beside, width, rounding)
            assert got.shape == y.shape
    with pytest.raises(ValueError, match="value: expected the shape of x"):
        functional.swiglu_quantize(gate, value[..., :1], law)
    with pytest.raises(ValueError, match="beside: expected the shape of x"):
        functional.gelu_quantize(gate, law, gate[:1])


MODULATED = ((2, 5, 3072), (1, 3, 1536), (2, 2, 2048), (1, 2, 4096), (1, 2, 5120), (1, 2, 6144), (2, 3, 1152), (1, 3, 40), (1, 2, 13))


def modulations(shape: tuple[int, ...], case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a norm site with a gate."""
    names, width = ("gate", "scale", "shift"), shape[-1]
    if case == "none":
        return {}
    tokens = shape[1] if case == "per token" else 1
    chunks = torch.randn(shape[0], tokens, 3 * width).to(torch.float32 if case == "float32" else dtype).chunk(3, dim=-1)
    found: dict[str, Any] = dict(zip(names, chunks, strict=True))
    if case in ("tables", "per token"):
        found |= {f"{name}_table": torch.randn(width) for name in names}
    if case == "affine":
        found |= {"weight": torch.randn(width).to(dtype), "bias": torch.randn(width).to(dtype)}
    if case == "tables and affine":  # between Wan's attentions
        found = {"gate": found["gate"], "gate_table": torch.randn(width), "weight": torch.randn(width), "bias": torch.randn(width)}
    return found


@pytest.mark.sanitize
@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("rounding", ["eager", "single"])
@pytest.mark.parametrize("case", ["plain", "tables", "per token", "float32", "affine", "tables and affine", "none"])
def test_a_norm_site_quantises_what_it_returns_otherwise(law: Law, rounding: str, case: str, device: str) -> None:
    """In one kernel or two."""
    expected = as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize
    for shape, dtype in itertools.product(MODULATED, HALVES if case == "plain" else (torch.bfloat16,)):
        x, residual = rows(shape, dtype).clamp(-1e4, 1e4).to(device), rows(shape, dtype).clamp(-1e4, 1e4).to(device)
        given = {name: t.to(device) for name, t in modulations(shape, case, dtype).items()}
        options: dict[str, Any] = {"norm": "fp32_layer" if "affine" in case else "layer", "eps": 1e-6, "rounding": rounding, **given}
        y, r = functional.scale_residual_norm_scale_shift(residual, x, **options)
        got, got_r = functional.scale_residual_norm_scale_shift_quantize(residual, x, law=law, **options)
        assert torch.equal(got_r.nan_to_num(), r.nan_to_num())
        assert equal(got[:2], expected(y, law)), (shape, dtype)
        assert got.shape == y.shape
        kept, beside, beside_r = functional.scale_residual_norm_scale_shift_and_quantize(residual, x, law=law, **options)
        assert torch.equal(kept.nan_to_num(), y.nan_to_num())
        assert torch.equal(beside_r.nan_to_num(), r.nan_to_num())
        assert equal(beside[:2], got[:2])
        for name in ("gate", "gate_table"):
            options.pop(name, None)
        if "affine" not in case or "and" not in case:
            y = functional.norm_scale_shift(x, **options)
            assert equal(functional.norm_scale_shift_quantize(x, law=law, **options)[:2], expected(y, law)), (shape, dtype)
            kept, beside = functional.norm_scale_shift_and_quantize(x, law=law, **options)
            assert torch.equal(kept.nan_to_num(), y.nan_to_num())
            assert equal(beside[:2], expected(y, law))


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize("n_rows", [1, 1024, 1025, 2048])
def test_the_largest_of_a_norms_rows_is_that_of_all(n_rows: int, device: str) -> None:
    """The quantiser looks for it among those of up to 1024 rows. Of more another kernel does."""
    expected = as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize
    for shape in ((n_rows, 64), (2, n_rows // 2 or 1, 72)):
        x, residual = torch.randn(2, *shape).to(torch.bfloat16).to(device)
        x[..., -1, -1] = 99
        options: dict[str, Any] = {"eps": 1e-6, "rounding": "eager"}
        y = functional.norm_scale_shift(x, **options)
        assert equal(functional.norm_scale_shift_quantize(x, law=FLOAT8_TENSOR, **options)[:2], expected(y, FLOAT8_TENSOR))
        y, _ = functional.scale_residual_norm_scale_shift(residual, x, **options)
        kept, got, _ = functional.scale_residual_norm_scale_shift_and_quantize(residual, x, law=FLOAT8_TENSOR, **options)
        assert torch.equal(kept, y)
        assert equal(got[:2], expected(y, FLOAT8_TENSOR))


MANY_ROWS = ((1, 2049, 3072), (3, 683, 1536), (1, 2051, 5120), (1, 2053, 1152), (1, 2050, 2432), (1, 2050, 1984), (2, 1031, 2048))
CASES = ("plain", "tables", "none")
# Under the sanitizers, where millions of elements take long, each shape in one case, in turn.
SITES_OF_MANY_ROWS = [
    pytest.param(shape, case, marks=[pytest.mark.sanitize] if nth == (k + 1) % len(CASES) else [], id=f"{shape}-{case}")
    for k, shape in enumerate(MANY_ROWS)
    for nth, case in enumerate(CASES)
]


@compiled_only
@pytest.mark.parametrize(("shape", "case"), SITES_OF_MANY_ROWS)
def test_a_norm_site_of_many_rows_quantises_what_it_returns_otherwise(shape: tuple[int, ...], case: str, device: str) -> None:
    """There are kernels for modulations that many rows share."""
    law = {3072: FLOAT8_ROW, 1536: FLOAT8_TENSOR, 2432: FLOAT8_TENSOR}.get(shape[2], INT8_ROW)
    x = rows(shape, torch.bfloat16).clamp(-1e4, 1e4).to(device)
    x[:, 7] = 0
    modulation = {name: t.to(device) for name, t in modulations(shape, case, torch.bfloat16).items() if "gate" not in name}
    options: dict[str, Any] = {"eps": 1e-6, "rounding": "eager", **modulation}
    expected = as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize
    for norm in ("layer", "rms"):
        y = functional.norm_scale_shift(x, **options, norm=norm)
        wanted = expected(y, law)
        assert equal(functional.norm_scale_shift_quantize(x, law=law, **options, norm=norm)[:2], wanted)
        kept, beside = functional.norm_scale_shift_and_quantize(x, law=law, **options, norm=norm)
        assert torch.equal(kept.nan_to_num(), y.nan_to_num())
        assert equal(beside[:2], wanted)


@pytest.mark.sanitize
@pytest.mark.parametrize("case", ["plain", "tables", "none", "gate", "no gate", "one gate a token"])
@pytest.mark.parametrize("shape", MANY_ROWS[:3], ids=str)
def test_a_residual_of_many_rows_is_added_and_quantised_as_otherwise(shape: tuple[int, ...], case: str, device: str) -> None:
    law = {3072: FLOAT8_ROW, 1536: FLOAT8_TENSOR}.get(shape[2], INT8_ROW)
    x, residual = (rows(shape, torch.bfloat16).clamp(-1e4, 1e4).to(device) for _ in range(2))
    x[:, 7], residual[:, 7] = 0, 0
    modulation = {
        name: t.to(device) for name, t in modulations(shape, case if case in ("plain", "none") else "tables", torch.bfloat16).items()
    }
    if case == "gate":
        modulation = {name: t for name, t in modulation.items() if "gate" in name}
    elif case == "no gate":
        modulation = {name: t for name, t in modulation.items() if "gate" not in name}
    elif case == "one gate a token":
        modulation["gate"] = torch.randn(shape).to(torch.bfloat16).to(device)
    options: dict[str, Any] = {"eps": 1e-6, "rounding": "eager", **modulation}
    expected = as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize
    for norm in ("layer", "rms"):
        y, r = functional.scale_residual_norm_scale_shift(residual, x, **options, norm=norm)
        got, got_r = functional.scale_residual_norm_scale_shift_quantize(residual, x, law=law, **options, norm=norm)
        assert torch.equal(got_r.nan_to_num(), r.nan_to_num())
        assert equal(got[:2], expected(y, law))
        kept, beside, beside_r = functional.scale_residual_norm_scale_shift_and_quantize(residual, x, law=law, **options, norm=norm)
        assert torch.equal(kept.nan_to_num(), y.nan_to_num())
        assert torch.equal(beside_r.nan_to_num(), r.nan_to_num())
        assert equal(beside[:2], got[:2])


# Just more than kCached of csrc/ops.cpp.
UNCACHED = {"cuda": ((1, 4099, 3072), (2, 2053, 3072), (2, 1231, 5120)), "cpu_sim": ((1, 2051, 3072), (2, 1027, 3072), (2, 1027, 5120))}


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize(("nth", "case"), [(0, "plain"), (1, "none"), (2, "tables"), (0, "per token")])
def test_a_norm_of_more_than_fits_into_a_cache_has_the_same_bits_with_one_scale(nth: int, case: str, device: str) -> None:
    """Kernels make it twice: for its largest element, and for its values."""
    shape = UNCACHED[kernels.path][nth]
    x, residual = (torch.randn(shape).to(torch.bfloat16).to(device) for _ in range(2))
    given = {name: t.to(device) for name, t in modulations(shape, case, torch.bfloat16).items()}
    options: dict[str, Any] = {"eps": 1e-6, "rounding": "eager", **given}
    expected = as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize
    y, r = functional.scale_residual_norm_scale_shift(residual, x, **options)
    got, got_r = functional.scale_residual_norm_scale_shift_quantize(residual, x, law=FLOAT8_TENSOR, **options)
    assert torch.equal(got_r, r)
    assert got.scale.shape == (1, 1)
    assert equal(got[:2], expected(y, FLOAT8_TENSOR))
    of_norm = {name: value for name, value in options.items() if "gate" not in name}
    y = functional.norm_scale_shift(x, **of_norm)
    assert equal(functional.norm_scale_shift_quantize(x, law=FLOAT8_TENSOR, **of_norm)[:2], expected(y, FLOAT8_TENSOR))
    x[0, 7, 7] = float("nan")  # in the row's y, and so in the scale
    y = functional.norm_scale_shift(x, **of_norm)
    assert equal(functional.norm_scale_shift_quantize(x, law=FLOAT8_TENSOR, **of_norm)[:2], expected(y, FLOAT8_TENSOR))


@compiled_only
@pytest.mark.sanitize
@pytest.mark.parametrize("width", [1536, 3072])
def test_rows_that_are_left_for_later_blocks_are_quantised_as_otherwise(width: int, device: str) -> None:
    """Of a residual's rows, from six for each warp of a GPU on (an H200 has 2112), the last are for
    blocks that start where another has ended.
    """
    shape = (1, 12701 if kernels.path == "cuda" else 2101, width)
    x, residual = (rows(shape, torch.bfloat16).clamp(-1e4, 1e4).to(device) for _ in range(2))
    modulation = {name: t.to(device) for name, t in modulations(shape, "tables", torch.bfloat16).items()}
    options: dict[str, Any] = {"eps": 1e-6, "rounding": "eager", **modulation}
    y, r = functional.scale_residual_norm_scale_shift(residual, x, **options)
    got, got_r = functional.scale_residual_norm_scale_shift_quantize(residual, x, law=INT8_ROW, **options)
    assert torch.equal(got_r.nan_to_num(), r.nan_to_num())
    assert equal(got[:2], (as_on_a_gpu if kernels.path == "cpu_sim" else quantization.quantize)(y, INT8_ROW))


def test_errors_of_a_quantised_norm_site_are_those_of_both_ops() -> None:
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="scale: got"):
        functional.norm_scale_shift_quantize(x, torch.ones(5), law=FLOAT8_ROW)
    with pytest.raises(ValueError, match="law: expected one of"):
        functional.norm_scale_shift_quantize(x, law="float8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="residual: "):
        functional.scale_residual_norm_scale_shift_quantize(x[..., :8], x, law=INT8_ROW)
    meta = functional.norm_scale_shift_quantize(x.to("meta"), law=INT8_ROW)
    assert (meta.values.shape, meta.values.dtype, meta.scale.shape) == ((6, 16), torch.int8, (6, 1))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_int8_product_is_scaled_as_torchao_does(dtype: torch.dtype, biased: bool, device: str) -> None:
    for n_rows, width in ((37, 1032), (1, 8), (129, 256)):
        product = torch.randint(-(2**22), 2**22, (n_rows, width), dtype=torch.int32, device=device)
        scale, weight_scale = 1e-3 * torch.rand(n_rows, 1, device=device), 1e-2 * torch.rand(width, 1, device=device)
        bias = torch.randn(width, device=device).to(dtype) if biased else None
        got = functional.dequantize_product(product, scale, weight_scale, bias, dtype)
        assert torch.equal(got, reference_quantize.dequantize_product(DequantizeProduct(product, scale, weight_scale, bias, dtype)))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_bad_arguments_are_named(law: Law) -> None:
    with pytest.raises(TypeError, match="x: expected dtype"):
        functional.quantize(torch.ones(3, 8, dtype=torch.int32), law)
    with pytest.raises(ValueError, match="x: expected shape"):
        functional.quantize(torch.ones(8), law)
    with pytest.raises(ValueError, match="law: expected one of"):
        functional.quantize(torch.ones(2, 8), "float8")  # type: ignore[arg-type]
    meta = functional.quantize(torch.ones(2, 3, 8, device="meta"), law)
    assert meta.values.shape == (6, 8)
    assert meta.scale.shape == ((6, 1) if law.per_row else (1, 1))
