"""Bad arguments raise an error that names the argument, what it got and what it accepts; none
computes something else.
"""

from typing import Any

import pytest
import torch
from support.cases import DEVICE, MODE, MODULATIONS, OPS, compiled_only, reference_only
from torch import Tensor

from ditnorm import kernels

B, S, D = 2, 6, 64
NORMED = ("norm_scale_shift", "scale_residual_norm_scale_shift")


def t(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def call(op: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"x": t(B, S, D)}
    if op != "norm_scale_shift":
        arguments["residual"] = t(B, S, D)
    return OPS[op](**(arguments | changes))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x: expected a Tensor, got list"),
        ({"x": t(B, S, D, dtype=torch.int64)}, TypeError, r"x: expected dtype float32, float16, bfloat16, float64, got torch.int64"),
        ({"rounding": "twice"}, ValueError, r"rounding: expected one of 'single', 'eager', got 'twice'"),
        ({"rounding": ["single"]}, ValueError, r"rounding: expected one of 'single', 'eager', got \['single'\]"),
        ({"index": t(B, S)}, TypeError, r"index: expected dtype bool, .*int64, got torch.bfloat16"),
        ({"index": 3}, TypeError, r"index: expected a Tensor, got int"),
        (
            {"index": t(B, S + 1, dtype=torch.int64)},
            ValueError,
            r"index: expected shape \[6\] or \[2 or 1, 6\] for x .*, got \[2, 7\]",
        ),
        (
            {"index": t(3, S, dtype=torch.int64)},
            ValueError,
            r"index: expected shape \[6\] or \[2 or 1, 6\] for x \[2, 6, 64\], got \[3, 6\]",
        ),
        ({"index": t(B, S, dtype=torch.int64)}, ValueError, r"index: given without a modulation to select rows of"),
    ],
)
def test_common_arguments(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(op, **changes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(D,), (1, B, S, D), (B, S, 0)])
def test_shape_of_x(op: str, shape: tuple[int, ...]) -> None:
    same = {} if op == "norm_scale_shift" else {"residual": t(*shape)}
    with pytest.raises(ValueError, match=r"x: expected shape \[B, S, D\] or \[S, D\] with D >= 1, got \["):
        call(op, x=t(*shape), **same)


@pytest.mark.parametrize("op", ["scale_residual", "scale_residual_norm_scale_shift"])
def test_residual(op: str) -> None:
    with pytest.raises(
        ValueError, match=r"residual: expected the shape of x, \[2, 6, 64\], or another batch where one of them is 1, got \[3, 6, 64\]"
    ):
        call(op, residual=t(3, S, D))
    with pytest.raises(TypeError, match=r"residual: expected dtype .*, got torch.int32"):
        call(op, residual=t(B, S, D, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"residual: expected a Tensor, got NoneType"):
        call(op, residual=None)


@pytest.mark.parametrize("op", NORMED)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"norm": "batch"}, ValueError, r"norm: expected one of 'layer', 'rms', 'fp32_layer', 'diffusers_rms', got 'batch'"),
        ({"eps": "small"}, TypeError, r"eps: expected a float, got str"),
        ({"weight": t(B, D)}, ValueError, r"weight: expected shape \[64\] \(the last dim of x\), got \[2, 64\]"),
        ({"bias": t(D + 1)}, ValueError, r"bias: expected shape \[64\] \(the last dim of x\), got \[65\]"),
        ({"bias": t(1)}, ValueError, r"bias: expected shape \[64\] \(the last dim of x\), got \[1\]"),
        ({"weight": t(D, dtype=torch.bool)}, TypeError, r"weight: expected dtype .*, got torch.bool"),
        ({"bias": 0.0}, TypeError, r"bias: expected a Tensor, got float"),
    ],
)
def test_norm(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(op, **changes)


PAIRS = [(op, name) for op in OPS for name in MODULATIONS[op]]


@pytest.mark.parametrize(("op", "name"), PAIRS)
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (D + 1,), (B + 1, D), (B, D - 1), (S, D), (B, 2, D), (B + 1, S, D), (B, 4, 1, D), (B, 0, 1, D), (B, 3, 2, D), (1,) * 5],
)
def test_shape_of_a_modulation(op: str, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got \[.*for x \[2, 6, 64\]; expected \[64\], \[2 or 1, 64\].*per frame, F dividing 6"):
        call(op, **{name: t(*shape)})


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_dtype_and_kind_of_a_modulation(op: str, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected dtype float32, float16, bfloat16, float64, got torch.int64"):
        call(op, **{name: t(D, dtype=torch.int64)})
    with pytest.raises(TypeError, match=rf"^{name}: expected a Tensor, got float"):
        call(op, **{name: 1.0})


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_tables(op: str, name: str) -> None:
    table = f"{name}_table"
    with pytest.raises(ValueError, match=rf"^{table}: given without {name}, the modulation it is added to"):
        call(op, **{table: t(D)})
    with pytest.raises(ValueError, match=rf"^{table}: expected shape \[64\] \(the last dim of x\), got \[1, 64\]"):
        call(op, **{name: t(D), table: t(1, D)})
    with pytest.raises(TypeError, match=rf"^{table}: expected dtype .*, got torch.int64"):
        call(op, **{name: t(D), table: t(D, dtype=torch.int64)})


@pytest.mark.parametrize(("op", "name"), PAIRS)
@pytest.mark.parametrize("shape", [(D,), (2, D + 1), (B + 1, 2, D), (0, D), (B, 2, 1, D)])
def test_rows_to_select(op: str, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: with index expected rows \[M, 64\] or \[2 or 1, M, 64\], got \["):
        call(op, **{name: t(*shape), "index": t(S, dtype=torch.int64)})


@pytest.mark.parametrize("op", NORMED)
def test_the_same_number_of_rows_for_all(op: str) -> None:
    with pytest.raises(ValueError, match=r"shift: with index every modulation has the same number of rows; got 3 after 2"):
        call(op, scale=t(2, D), shift=t(3, D), index=t(S, dtype=torch.int64))


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, name in PAIRS] + [(op, n) for op in NORMED for n in ("weight", "bias")] + [("scale_residual", "residual")],
)
def test_one_tensor_on_another_device(op: str, name: str) -> None:
    # PyTorch sends such a call to the fake kernel, whose result is uninitialised memory.
    shape = (B, S, D) if name == "residual" else (D,)
    with pytest.raises(ValueError, match=rf"^{name}: expected the device of x, {DEVICE}.*, got meta"):
        call(op, **{name: t(*shape, device="meta")})


@pytest.mark.parametrize("op", OPS)
def test_x_index_or_table_on_another_device(op: str) -> None:
    name = MODULATIONS[op][0]
    with pytest.raises(ValueError, match=r"index: expected the device of x"):
        call(op, **{name: t(2, D), "index": t(S, dtype=torch.int64, device="meta")})
    with pytest.raises(ValueError, match=rf"{name}_table: expected the device of x"):
        call(op, **{name: t(D), f"{name}_table": t(D, device="meta")})
    with pytest.raises(ValueError, match=r": expected the device of x, meta, got"):
        call(op, x=t(B, S, D, device="meta"), **{name: t(D)})


@pytest.mark.parametrize("op", OPS)
def test_a_rejected_call_is_not_counted(op: str) -> None:
    before = kernels.counts()
    with pytest.raises(ValueError, match="expected"):
        call(op, **{MODULATIONS[op][0]: t(3)})
    assert kernels.counts() == before
    call(op)
    path = "reference" if MODE == "reference" or (MODE == "cuda" and kernels.unavailable) else kernels.path
    assert {key: n - before[key] for key, n in kernels.counts().items() if n != before[key]} == {(op, path): 1}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [-1, 2])
@reference_only
def test_an_index_out_of_range_on_the_cpu(op: str, value: int) -> None:
    index = torch.tensor([0, 1, value, 0, 1, 0])
    with pytest.raises(IndexError, match=rf"index: values from {min(value, 0)} to {max(value, 1)}, but the modulation has 2 rows"):
        call(op, **{MODULATIONS[op][0]: t(2, D), "index": index})


@pytest.mark.parametrize("how", ["gradients", "autocast", "mixed dtypes", "a batch that is broadcast", "float64"])
@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("value", [-1, 3])
@reference_only
def test_an_index_out_of_range_on_the_cpu_where_the_call_runs_unfused(value: int, rows: int, how: str) -> None:
    batch = 1 if how == "a batch that is broadcast" else B
    x = t(batch, S, D, dtype=torch.float64 if how == "float64" else torch.bfloat16).requires_grad_(how == "gradients")
    scale = t(B, rows, D, dtype=torch.float16 if how == "mixed dtypes" else torch.bfloat16)
    index = torch.tensor([0, 1, value, 0, 1, 0])
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), pytest.raises(IndexError, match=r"index: values from"):
        OPS["norm_scale_shift"](x, scale, index=index, rounding="eager")


@compiled_only
@pytest.mark.sanitize
@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("value", [-1, 2, 2**40, -(2**40)])
@pytest.mark.parametrize("width", [3, 64, 3072])
@pytest.mark.parametrize("op", OPS)
def test_an_index_out_of_range_gives_a_row_of_nan(op: str, width: int, value: int, rounding: str) -> None:
    index = torch.tensor([[0, 1, value, 0, 1, 0]], device=DEVICE)
    x = torch.randn(1, S, width, device=DEVICE)
    same = {} if op == "norm_scale_shift" else {"residual": x}
    rows = {name: torch.randn(2, width, device=DEVICE) for name in MODULATIONS[op]}
    results = OPS[op](x=x, **same, **rows, index=index, rounding=rounding)
    for result in results if isinstance(results, tuple) else (results,):
        assert result[0, 2].isnan().all()
        assert result[0, [0, 1, 3, 4, 5]].isfinite().all()
