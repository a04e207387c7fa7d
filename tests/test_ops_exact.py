"""``rounding="single"`` against float64: no more error than one rounding of each result, whatever
the arguments look like.
"""

from typing import Any

import pytest
import torch
from support.cases import (
    DEVICE,
    EPS,
    FLOATS,
    LAYOUTS,
    MODULATIONS,
    OPS,
    ROWS,
    UNIT,
    VIEWS,
    X_LAYOUTS,
    Shape,
    activation,
    dense,
    exact,
    modulation,
    random_call,
    rounded_once,
    run,
    selection,
)
from torch import Tensor

WIDTHS = (1, 2, 3, 4, 5, 8, 20, 33, 48, 64, 100, 127, 520, 1024, 1152, 1536, 1920, 2432, 3072, 4104, 5120, 6144, 8200)


def check(op: str, call: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    y, r = run(op, call)
    expected_y, expected_r = exact(call, r)
    for result, expected, like in ((y, expected_y, call["x"]), (r, expected_r, call.get("residual"))):
        if result is not None and expected is not None and like is not None:
            assert result.is_contiguous()
            assert result.dtype is like.dtype
            assert result.shape == like.shape
            rounded_once(result, expected)
    return y, r


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", OPS)
def test_random_arguments_are_rounded_once(op: str, width: int, seed: int) -> None:
    check(op, random_call(op, width, seed, "single"))


def _call(op: str, shape: Shape, dtype: torch.dtype, layout: str = "contiguous", norm: str = "layer") -> dict[str, Any]:
    call: dict[str, Any] = {"x": activation(layout, shape, dtype), "rounding": "single"}
    if op != "norm_scale_shift":
        call["residual"] = activation(layout, shape, dtype)
    if op != "scale_residual":
        call |= {"norm": norm, "eps": EPS}
    return call


@pytest.mark.parametrize("layout", LAYOUTS + VIEWS + ROWS)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in MODULATIONS[op]])
def test_each_modulation_layout_alone(op: str, name: str, layout: str) -> None:
    shape = Shape(3, 6, 72, frames=2, rows=4)
    call = _call(op, shape, torch.bfloat16) | {name: modulation(layout, shape, torch.bfloat16)}
    if layout in ROWS:
        call["index"] = selection("int64", shape)
    check(op, call)


@pytest.mark.parametrize("table_dtype", FLOATS)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in MODULATIONS[op]])
def test_a_table_is_added_in_float32(op: str, name: str, table_dtype: torch.dtype) -> None:
    # A float32 result shows a table rounded to 16 bits, or a sum rounded to them.
    shape = Shape(2, 3, 40)
    call = _call(op, shape, torch.float32)
    call |= {name: modulation("token", shape, torch.bfloat16), f"{name}_table": modulation("vector", shape, table_dtype)}
    check(op, call)


@pytest.mark.parametrize("layout", X_LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_strided_and_unaligned_activations(op: str, layout: str) -> None:
    shape = Shape(3, 5, 64)
    call = _call(op, shape, torch.bfloat16, layout) | {name: modulation("chunk", shape, torch.bfloat16) for name in MODULATIONS[op]}
    check(op, call)
    if "residual" in call:  # the strides of x and residual are independent
        check(op, call | {"residual": activation("contiguous", shape, torch.bfloat16)})


@pytest.mark.parametrize("kind", ["bool", "uint8", "int8", "int16", "int32", "int64", "bool_1d", "int32_1d"])
@pytest.mark.parametrize("op", OPS)
def test_every_integer_dtype_of_index(op: str, kind: str) -> None:
    shape = Shape(2, 7, 64)
    call = _call(op, shape, torch.float16) | {name: modulation("rows_batch", shape, torch.float16) for name in MODULATIONS[op]}
    check(op, call | {"index": selection(kind, shape)})


@pytest.mark.parametrize("affine", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", ["layer", "rms", "fp32_layer"])
@pytest.mark.parametrize("op", ["norm_scale_shift", "scale_residual_norm_scale_shift"])
def test_weight_and_bias_each_alone(op: str, norm: str, dtype: torch.dtype, affine: tuple[str, ...]) -> None:
    shape = Shape(1, 3, 96)
    check(op, _call(op, shape, torch.bfloat16, norm=norm) | {name: modulation("vector", shape, dtype) for name in affine})


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 1024, 3072])
@pytest.mark.parametrize("op", ["norm_scale_shift", "scale_residual_norm_scale_shift"])
def test_half_precision_error_is_that_of_one_rounding(op: str, width: int, dtype: torch.dtype, norm: str) -> None:
    shape = Shape(2, max(4, 8192 // width), width)
    call = _call(op, shape, dtype, norm=norm) | {name: modulation("sample", shape, dtype) for name in MODULATIONS[op]}
    y, r = check(op, call)
    expected = exact(call, r)[0]
    assert y is not None
    assert expected is not None
    once = (expected.value.to(dtype).double() - expected.value).norm()
    assert (y.double() - expected.value).norm() <= 1.02 * once


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [100, 1024, 3072])
def test_float32_error_is_not_above_that_of_the_eager_chain(width: int, norm: str, mean: float) -> None:
    rows = 64
    shape = Shape(1, rows, width)
    call = {"x": activation("contiguous", shape, torch.float32, mean=mean, std=1.0), "norm": norm, "eps": EPS}
    call |= {name: modulation("sample", shape, torch.float32) for name in ("scale", "shift")}
    expected = exact(call, None)[0]
    assert expected is not None
    single, eager = (
        (OPS["norm_scale_shift"](**call, rounding=rounding).double() - expected.value).norm() for rounding in ("single", "eager")
    )
    # An error of a row's statistics is common to the row, so a norm over n rows of equally good
    # algorithms scatters by 1 / sqrt(2 n).
    assert single <= (1 + 3 / (2 * rows) ** 0.5) * eager


@pytest.mark.parametrize("width", [64, 100, 3072, 8200])
def test_a_large_mean_does_not_cancel(width: int) -> None:
    # mean(x^2) - mean^2 would lose 1e8 * 2^-24 of a variance of 1: the bound below is hundreds of
    # times smaller.
    shape = Shape(1, 4, width)
    x = activation("contiguous", shape, torch.float32, mean=1e4, std=1.0)
    call = {"x": x, "norm": "layer", "eps": EPS, "rounding": "single"}
    expected = exact(call, None)[0]
    assert expected is not None
    y = OPS["norm_scale_shift"](**call).double()
    spread = y.square().mean(-1).sqrt() / expected.value.square().mean(-1).sqrt()
    assert (spread - 1).abs().max() <= (width / 32 + 16) * UNIT * 1e4 / 2 + 8 * UNIT
    rounded_once(y.float(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [20, 64, 100, 3072])
@pytest.mark.parametrize("op", ["norm_scale_shift", "scale_residual_norm_scale_shift"])
@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_nan_and_infinity_stay_in_their_row(op: str, width: int, value: float, rounding: str) -> None:
    shape = Shape(1, 5, width)
    call = _call(op, shape, torch.bfloat16) | {"rounding": rounding, "scale": modulation("sample", shape, torch.bfloat16)}
    clean, _ = run(op, call)
    call["x"] = call["x"].clone()
    call["x"][0, 2, width // 2] = value
    y, r = run(op, call)
    assert clean is not None
    assert y is not None
    others = [0, 1, 3, 4]
    assert torch.equal(y[:, others], clean[:, others])
    assert y[0, 2].isnan().all()
    assert r is None or int((~r.isfinite()).sum()) == 1


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64), (0, 0, 3), (0, 64)])
@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_no_rows(op: str, shape: tuple[int, ...], rounding: str) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    call: dict[str, Any] = {"x": x, "rounding": rounding} | ({} if op == "norm_scale_shift" else {"residual": x})
    call |= {name: torch.randn(64 if shape[-1] == 64 else 3, device=DEVICE).bfloat16() for name in MODULATIONS[op]}
    for result in run(op, call):
        assert result is None or result.shape == shape


def test_one_token_and_many_frames() -> None:
    shape = Shape(2, 12, 24, frames=12)
    call = _call("norm_scale_shift", shape, torch.float32) | {"scale": modulation("frame", shape, torch.float32)}
    check("norm_scale_shift", call)
    assert torch.equal(dense(call["scale"], call["x"], None), call["scale"].double().squeeze(2))


def test_a_constant_row_gives_the_shift() -> None:
    x = torch.full((1, 2, 64), 3.0, device=DEVICE)
    shift = torch.randn(64, device=DEVICE)
    assert torch.equal(OPS["norm_scale_shift"](x, None, shift), shift.expand(1, 2, 64))
