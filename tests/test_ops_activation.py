"""GELU and SwiGLU written behind what the next linear layer reads beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import DEVICE, FLOATS, MODE, compiled_only
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import gelu, swiglu
from ditnorm.ops.bits import same_bits

HALVES = (torch.float16, torch.bfloat16)
ROUNDINGS = ("single", "eager")
# [..., D] and the width of what stands beside it: of models, odd ones, and those that no 16 bytes
# divide.
SHAPES = (
    ((2, 3, 512), 128),
    ((1, 5, 12288), 3072),
    ((4, 1032), 40),
    ((1, 1, 8), 8),
    ((2, 3, 13), 5),
    ((3, 64), 12),
    ((3, 1), 1),
    ((2, 0, 64), 64),
    ((0, 7, 13), 64),
)
LAYOUTS = ("contiguous", "one projection", "transposed", "expanded", "unaligned", "batches apart")


def laid_out(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers in one of ``LAYOUTS``."""
    width = shape[-1]

    def random(*size: int) -> Tensor:
        return (3 * torch.randn(size)).to(dtype).to(DEVICE)

    match layout:
        case "one projection":
            return random(*shape[:-1], 3 * width + 16)[..., width + 16 : 2 * width + 16]
        case "transposed":
            return random(*shape[:-2], width, shape[-2]).transpose(-1, -2)
        case "expanded":
            return random(*shape[:-2], 1, width).expand(shape)
        case "unaligned":
            return random(torch.Size(shape).numel() + 1)[1:].view(shape)
        case "batches apart":
            return random(*shape[:-2], shape[-2] + 3, width)[..., 2 : 2 + shape[-2], :]
        case _:
            return random(*shape)


def rounded_once(x: Tensor, value: Tensor | None) -> Tensor:
    """The activation in float64."""
    return F.gelu(x.double(), approximate="tanh") if value is None else F.silu(x.double()) * value.double()


def upstream(x: Tensor, value: Tensor | None, beside: Tensor | None) -> Tensor:
    y = F.gelu(x, approximate="tanh") if value is None else F.silu(x) * value
    return y if beside is None else torch.cat([beside, y], dim=-1)


def close(y: Tensor, x: Tensor, value: Tensor | None, rounding: str) -> bool:
    """Whether no element is further from the exact result than its roundings, and the exponential's
    or tanh's few last digits, take it.
    """
    exact = rounded_once(x, value)
    unit, wide = torch.finfo(y.dtype).eps / 2, torch.finfo(torch.float32).eps
    roundings = 2 if value is not None and rounding == "eager" else 1
    # Half of GELU is 1 + tanh, of which that of a negative number cancels: there an error of the
    # tanh is one of x.
    bound = exact.abs() * (roundings * unit * (1 + unit) + 8 * wide) + (8 * wide * x.double().abs() if value is None else 0)
    if value is not None:
        bound = bound + (value.double().abs() * torch.finfo(y.dtype).smallest_normal * unit * 2 if rounding == "eager" else 0)
    return bool(((y.double() - exact).abs() <= bound + torch.finfo(y.dtype).smallest_normal * unit * 2).all())


def call(x: Tensor, value: Tensor | None, beside: Tensor | None, rounding: str) -> Tensor:
    return gelu(x, beside, rounding=rounding) if value is None else swiglu(x, value, beside, rounding=rounding)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_float64(dtype: torch.dtype, rounding: str, gated: bool, layout: str) -> None:
    """Of every layout and width; what stands beside is copied bit for bit, NaN too."""
    for shape, width in SHAPES:
        x = laid_out(layout, shape, dtype)
        value = laid_out(layout, shape, dtype) if gated else None
        beside = laid_out(layout, (*shape[:-1], width), dtype)
        if beside.numel() and layout != "expanded":
            beside[..., 0] = float("nan")
        y = call(x, value, beside, rounding)
        assert y.shape == (*shape[:-1], width + shape[-1])
        assert y.is_contiguous()
        assert y.dtype is dtype
        assert same_bits(y[..., :width].contiguous(), beside.clone(memory_format=torch.contiguous_format))
        assert close(y[..., width:], x, value, rounding), (shape, width)
        assert torch.equal(call(x, value, None, rounding), y[..., width:])


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_eager_has_upstreams_bits(dtype: torch.dtype, gated: bool) -> None:
    """On a GPU, and where PyTorch's operations serve; the tanh and exponential of a host build are
    another library's.
    """
    for shape, width in SHAPES:
        h = laid_out("contiguous", (*shape[:-1], 2 * shape[-1] + width), dtype)
        beside, x, value = h.split([width, shape[-1], shape[-1]], dim=-1)
        value = value if gated else None
        y, expected = call(x, value, beside, "eager"), upstream(x, value, beside)
        if MODE != "cpu_sim":
            assert torch.equal(y, expected)
        elif dtype is not torch.float32:  # a last digit of float32 seldom reaches that of a half
            assert (y != expected).sum() <= 0.02 * y.numel() + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_has_the_bits_of_pytorchs(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype).view(-1, 64)
    pairs = [(gelu(every, rounding="eager"), upstream(every, None, None))]
    for value in (1.0, -0.37, 3.14e4, 6.1e-5):
        values = torch.full_like(every, value)
        pairs.append((swiglu(every, values, rounding="eager"), upstream(every, values, None)))
    for got, expected in pairs:
        assert torch.equal(got.nan_to_num(-1.0).view(torch.int16), expected.nan_to_num(-1.0).view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_is_divided_alike_at_any_place(dtype: torch.dtype) -> None:
    """Aligned rows are divided without the branch for what is out of the common, if nothing among
    eight neighbours is; others element by element. Infinities, zeros of both signs and NaN, too.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for numbers in (every, every[torch.randperm(every.numel())]):
        x = numbers.to(DEVICE).view(-1, 64)
        unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        for value in (torch.ones_like(x), torch.full_like(x, -0.37)):
            for rounding in ROUNDINGS:
                got, expected = swiglu(x, value, rounding=rounding), swiglu(unaligned, value, rounding=rounding)
                assert same_bits(got.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_float32_has_the_bits_of_pytorchs(gated: bool) -> None:
    """Numbers of all exponents, and many where the activations bend."""
    bits = torch.randint(-(2**31), 2**31, (1 << 24,), device=DEVICE, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([bits, 4 * torch.randn(1 << 24, device=DEVICE)]).view(-1, 4096)
    value = torch.randn_like(x) if gated else None
    got, expected = call(x, value, None, "eager"), upstream(x, value, None)
    assert torch.equal(got.nan_to_num(-1.0).view(torch.int32), expected.nan_to_num(-1.0).view(torch.int32))


@pytest.mark.gpu
@pytest.mark.slow
def test_rows_beyond_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    rows, width = 140_000, 16384
    x = torch.randn(1, 1, width, device=DEVICE, dtype=torch.bfloat16).expand(1, rows, width)
    y = gelu(x, x[..., :8], rounding="eager")
    expected = upstream(x[:, :1], None, x[:, :1, :8])
    for first in range(0, rows, 20_000):
        part = y[:, first : first + 20_000]
        assert torch.equal(part, expected.expand_as(part))


@pytest.mark.sanitize
@compiled_only
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_element_of_the_result_is_written(dtype: torch.dtype, gated: bool) -> None:
    """Twice into memory that holds NaN before."""
    for shape, width in SHAPES:
        x, beside = laid_out("contiguous", shape, dtype), laid_out("contiguous", (*shape[:-1], width), dtype)
        value = x if gated else None
        first = call(x, value, beside, "eager")
        expected = first.clone()
        first.fill_(float("nan"))
        del first
        assert torch.equal(call(x, value, beside, "eager"), expected)


@compiled_only
@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_a_kernel_serves_every_layout(gated: bool) -> None:
    name = "swiglu" if gated else "gelu"
    before = kernels.counts()
    for layout in LAYOUTS:
        x = laid_out(layout, (2, 3, 64), torch.bfloat16)
        call(x, x if gated else None, x, "eager")
    changes = {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]}
    assert changes == {(name, kernels.path): len(LAYOUTS)}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_mixed_dtypes_run_unfused_with_upstreams_results(rounding: str) -> None:
    x, value, beside = torch.randn(2, 3, 8, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE).half(), torch.randn(2, 3, 4, device=DEVICE)
    before = kernels.counts()
    y = swiglu(x, value, beside.bfloat16(), rounding=rounding)
    assert torch.equal(y, upstream(x, value, beside.bfloat16()))
    assert torch.equal(gelu(x.double(), beside, rounding=rounding), upstream(x.double(), None, beside))
    changes = {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]}
    assert changes == {("swiglu", "reference"): 1, ("gelu", "reference"): 1}


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gradients_are_those_of_the_expression(rounding: str, gated: bool) -> None:
    def leaves() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(2, 3, n, dtype=torch.float32, device=DEVICE).requires_grad_() for n in (16, 16, 8)]

    (x, value, beside), theirs = leaves(), leaves()
    y, expected = call(x, value if gated else None, beside, rounding), upstream(theirs[0], theirs[1] if gated else None, theirs[2])
    weights = torch.randn_like(y)
    y.backward(weights)
    expected.backward(weights)
    torch.testing.assert_close(y, expected)
    for ours, other in zip((x, value, beside), theirs, strict=True):
        assert (ours.grad is None) == (other.grad is None)
        if ours.grad is not None and MODE != "cpu_sim":
            assert torch.equal(ours.grad, other.grad)  # type: ignore[arg-type]
        elif ours.grad is not None:  # the exponential of a host build is another library's
            torch.testing.assert_close(ours.grad, other.grad)


def test_single_saves_its_inputs_only() -> None:
    x, value, beside = (torch.randn(2, 3, 64, device=DEVICE).bfloat16().requires_grad_() for _ in range(3))
    kept = {t.untyped_storage().data_ptr() for t in (x, value, beside)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        gelu(x, beside)
        swiglu(x, value, beside)
    assert {t.untyped_storage().data_ptr() for t in saved} <= kept


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (gelu, ([1.0],), {}, TypeError, r"x: expected a Tensor, got list"),
        (gelu, (zeros(2, 8, dtype=torch.int64),), {}, TypeError, r"x: expected dtype float32, .*, got torch.int64"),
        (gelu, (zeros(8),), {}, ValueError, r"x: expected shape \[B, S, D\] or \[S, D\] with D >= 1, got \[8\]"),
        (gelu, (zeros(2, 0),), {}, ValueError, r"x: expected shape .* with D >= 1, got \[2, 0\]"),
        (
            gelu,
            (zeros(2, 8), zeros(3, 8)),
            {},
            ValueError,
            r"beside: expected the shape of x, \[2, 8\], but for the last dim, got \[3, 8\]",
        ),
        (gelu, (zeros(2, 8), zeros(1, 2, 8)), {}, ValueError, r"beside: expected the shape of x, .*, got \[1, 2, 8\]"),
        (gelu, (zeros(2, 8), zeros(2, 8, device="meta")), {}, ValueError, r"beside: expected the device of x, .*, got meta"),
        (gelu, (zeros(2, 8),), {"rounding": "twice"}, ValueError, r"rounding: expected one of 'single', 'eager', got 'twice'"),
        (swiglu, (zeros(2, 8), None), {}, TypeError, r"value: expected a Tensor, got NoneType"),
        (swiglu, (zeros(2, 8), zeros(2, 16)), {}, ValueError, r"value: expected the shape of x, \[2, 8\], got \[2, 16\]"),
        (swiglu, (zeros(2, 8), zeros(2, 8), zeros(8)), {}, ValueError, r"beside: expected the shape of x, .*, got \[8\]"),
        (swiglu, (zeros(2, 8), zeros(2, 8, device="meta")), {}, ValueError, r"value: expected the device of x, .*, got meta"),
    ],
)
def test_bad_arguments_are_named(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        function(*arguments, **options)


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_compiled_without_a_graph_break(gated: bool) -> None:
    x, beside = torch.randn(2, 3, 16, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 2):
            arguments = (x[:, :tokens], x[:, :tokens] if gated else None, beside[:, :tokens], "eager")
            assert torch.equal(compiled(*arguments), call(*arguments))
    mixed = (x, x if gated else None, beside.half(), "eager")
    with torch.no_grad():
        assert torch.equal(compiled(*mixed), call(*mixed))


def test_traced_on_meta_tensors_gives_the_shape() -> None:
    x = zeros(2, 3, 8, device="meta")
    assert gelu(x, zeros(2, 3, 5, device="meta")).shape == (2, 3, 13)
    assert swiglu(x, x).shape == (2, 3, 8)
