"""Norm sites of diffusers' RMSNorm over the whole width, with and without a normed branch: what
they equal, and how far they are from the exact result.
"""

from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from support import aten_replay
from support.cases import (
    DEVICE,
    FLOATS,
    LAYOUTS,
    MODE,
    ROWS,
    UNIT,
    VIEWS,
    X_LAYOUTS,
    Shape,
    activation,
    dense,
    modulation,
    poison,
    selection,
)
from torch import Tensor

from ditnorm import kernels
from ditnorm.functional import (
    norm_scale_residual,
    norm_scale_residual_norm_scale_shift,
    norm_scale_shift,
    scale_residual_norm_scale_shift,
)
from ditnorm.ops.bits import same_bits

HALVES = (torch.float16, torch.bfloat16)
EPS = 1e-5
SITES = ("norm", "residual_norm", "norm_residual_norm", "norm_residual")
ARGUMENTS = {
    "norm": ("scale", "shift", "weight"),
    "residual_norm": ("residual", "gate", "scale", "shift", "weight"),
    "norm_residual_norm": ("residual", "x_weight", "gate", "scale", "shift", "weight"),
    "norm_residual": ("residual", "x_weight", "gate"),
}
# Widths of models, those that end inside of an access of a warp, and those of other orders.
WIDTHS = (3840, 2304, 2048, 4096, 2560, 136, 1160, 3000, 5120, 8160, 128, 132, 24, 40, 64, 96, 20, 8)
FEW_ROWS = (1, 2, 3, 5, 9, 15)


def call(site: str, arguments: dict[str, Any], rounding: str) -> tuple[Tensor | None, Tensor | None]:
    """``(y, r)`` of the op, on memory that held NaN."""
    poison(arguments["x"])
    options: dict[str, Any] = {"eps": EPS, "rounding": rounding}
    match site:
        case "norm":
            return norm_scale_shift(**arguments, norm="diffusers_rms", **options), None
        case "residual_norm":
            return scale_residual_norm_scale_shift(**arguments, norm="diffusers_rms", **options)
        case "norm_residual_norm":
            return norm_scale_residual_norm_scale_shift(**arguments, **options)
        case _:
            return None, norm_scale_residual(**arguments, **options)


def diffusers_rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Diffusers' module, or with a host build of the kernels what it computes on CUDA."""
    if MODE == "cpu_sim":
        rows = x.numel() // x.shape[-1]
        return aten_replay.diffusers_rms_norm(x.contiguous(), weight, EPS, aten_replay.mean_lanes(rows, x.shape[-1]) if rows else 32)
    norm = RMSNorm(x.shape[-1], eps=EPS, elementwise_affine=weight is not None)
    return norm(x) if weight is None else torch.func.functional_call(norm, {"weight": weight}, (x,))


def upstream(site: str, a: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """As ``ZImageTransformerBlock`` writes it."""
    x = a["x"]
    r = None
    if site != "norm":
        branch = x if site == "residual_norm" else diffusers_rms_norm(x, a.get("x_weight"))
        r = x = a["residual"] + (branch if a.get("gate") is None else a["gate"] * branch)
        if site == "norm_residual":
            return None, r
    y = diffusers_rms_norm(x, a.get("weight"))
    if a.get("scale") is not None:
        y = y * (1 + a["scale"])
    return y if a.get("shift") is None else y + a["shift"], r


def arguments_of(site: str, shape: Shape, dtype: torch.dtype, layout: str = "contiguous", modulations: str = "chunk_3d") -> dict[str, Any]:
    """With every tensor that the site takes; each row has its own scale."""
    spread = torch.randn(shape.batch, shape.tokens, 1, device=DEVICE).exp()

    def rows() -> Tensor:
        x = activation(layout, shape, dtype)
        return x if layout != "contiguous" else (x * spread).to(dtype)

    given: dict[str, Any] = {"x": rows()}
    for name in ARGUMENTS[site]:
        if name == "residual":
            given[name] = rows()
        elif name.endswith("weight"):
            given[name] = (1 + 0.3 * torch.randn(shape.width)).to(dtype).to(DEVICE)
        else:
            given[name] = modulation(modulations, shape, dtype)
    return given


def assert_equal(got: tuple[Tensor | None, Tensor | None], expected: tuple[Tensor | None, Tensor | None]) -> None:
    for name, a, b in zip("yr", got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.is_contiguous()
            assert a.dtype is b.dtype
            assert same_bits(a, b.contiguous()), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("width", WIDTHS)
def test_eager_keeps_every_bit_of_upstream(width: int, site: str, dtype: torch.dtype) -> None:
    """Modulated by views of one tensor as in a block, without a shift, and with nothing at all."""
    shape = Shape(2, 200 if MODE == "cuda" else 9, width)
    given = arguments_of(site, shape, dtype)
    for left_out in ((), ("shift",), ("weight", "x_weight"), ("gate", "scale", "shift")):
        some = {name: t for name, t in given.items() if name not in left_out}
        assert_equal(call(site, some, "eager"), upstream(site, some))


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("width", [3840, 256, 64, 24])
def test_eager_keeps_every_bit_of_few_rows(width: int, rows: int) -> None:
    """Where a row has more of ATen's threads than a warp."""
    for dtype in FLOATS:
        given = arguments_of("norm_residual_norm", Shape(1, rows, width), dtype)
        assert_equal(call("norm_residual_norm", given, "eager"), upstream("norm_residual_norm", given))


@pytest.mark.parametrize("layout", [name for name in X_LAYOUTS if name != "channel_strided"])
@pytest.mark.parametrize("site", SITES)
def test_eager_keeps_every_bit_of_views(site: str, layout: str) -> None:
    for width in (256, 520, 40):
        given = arguments_of(site, Shape(2, 10, width), torch.bfloat16, layout)
        assert_equal(call(site, given, "eager"), upstream(site, given))
        flat = {name: t[0] if name in ("x", "residual") else t for name, t in given.items() if name not in ("gate", "scale", "shift")}
        if MODE != "cuda":  # 10 rows
            assert_equal(call(site, flat, "eager"), upstream(site, flat))


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS + VIEWS + ROWS)
@pytest.mark.parametrize("site", SITES)
def test_single_against_float64(site: str, layout: str) -> None:
    """Of every layout of the modulations, in every dtype: no more error than one rounding."""
    for dtype in FLOATS:
        for width in (256, 40, 13, 1160):
            shape = Shape(2, 10, width, frames=2, rows=3)
            given = arguments_of(site, shape, dtype, modulations=layout)
            if layout in ROWS:
                given["index"] = selection("int64", shape)
            y, r = call(site, given, "single")
            for result, (exact, slack) in zip((y, r), exactly(site, given, r), strict=True):
                if result is None:
                    continue
                half_ulp = exact.abs() * torch.finfo(dtype).eps / 2
                assert ((result.double() - exact).abs() <= half_ulp * 1.01 + slack + torch.finfo(dtype).smallest_normal).all()


def exactly(site: str, given: dict[str, Any], r: Tensor | None) -> list[tuple[Any, Any]]:
    """``y`` (given the ``r`` that was stored) and ``r`` in float64, and how far float32 may be."""
    x, index = given["x"].double(), given.get("index")
    width = x.shape[-1]
    slack = (width / 32 + 32) * UNIT  # of a norm: its chain of sums, and some operations

    def of(name: str, missing: float) -> Tensor:
        if given.get(name) is None:
            return torch.tensor(missing, dtype=torch.float64, device=x.device)
        return given[name].double() if name.endswith("weight") else dense(given[name], x, index)

    def norm(v: Tensor, weight: str) -> Tensor:
        return v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt() * of(weight, 1.0)

    results: list[tuple[Any, Any]] = [(None, None), (None, None)]
    if site != "norm":
        branch = x if site == "residual_norm" else norm(x, "x_weight")
        residual, gate = given["residual"].double(), of("gate", 1.0)
        results[1] = residual + gate * branch, slack * (residual.abs() + (gate * branch).abs())
        assert r is not None
        x = r.double()
    if site != "norm_residual":
        n, scale, shift = norm(x, "weight"), of("scale", 0.0), of("shift", 0.0)
        results[0] = n * (1 + scale) + shift, slack * ((n * (1 + scale.abs())).abs() + shift.abs())
    return results


@pytest.mark.parametrize("site", SITES[1:])
def test_an_index_out_of_range_gives_a_row_of_nan(site: str) -> None:
    if MODE == "reference":
        pytest.skip("an IndexError on the CPU")
    for width in (256, 40):
        given = arguments_of(site, Shape(1, 20, width, rows=2), torch.bfloat16, modulations="rows")
        given["index"] = torch.tensor([0, 1] * 9 + [2, -1], device=DEVICE)
        for result in call(site, given, "eager"):
            if result is not None:
                assert result[:, -2:].isnan().all()
                assert result[:, :-2].isfinite().all()


@pytest.mark.parametrize("site", SITES)
def test_where_dtypes_are_mixed_upstreams_expression_runs(site: str) -> None:
    base = arguments_of(site, Shape(2, 10, 40), torch.bfloat16)
    for name in ARGUMENTS[site]:
        given = base | {name: base[name].float()}
        before = kernels.counts()
        got = call(site, given, "eager")
        assert sum(n - before[key] for key, n in kernels.counts().items() if key[1] == "reference") == 1, name
        if MODE != "cpu_sim":
            assert_equal(got, upstream(site, given))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("rounding", ["single", "eager"])
def test_gradients_are_those_of_the_expression(rounding: str, site: str) -> None:
    given = {name: t.detach() for name, t in arguments_of(site, Shape(2, 10, 40), torch.float32, modulations="sample_3d").items()}
    ours, theirs = ({name: t.clone().requires_grad_() for name, t in given.items()} for _ in range(2))
    if MODE == "cpu_sim":
        pytest.skip("the replayed norm has no gradients")
    got, expected = call(site, ours, rounding), upstream(site, theirs)
    sum(t.square().sum() for t in got if t is not None).backward()  # type: ignore[union-attr]
    sum(t.square().sum() for t in expected if t is not None).backward()  # type: ignore[union-attr]
    for name, t in ours.items():
        torch.testing.assert_close(t.grad, theirs[name].grad)


@pytest.mark.parametrize("site", SITES)
def test_compiled_without_a_graph_break(site: str) -> None:
    given = arguments_of(site, Shape(2, 20, 40), torch.float32)
    given.pop("index", None)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for a, b in zip(compiled(site, given, "eager"), call(site, given, "eager"), strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x_weight": torch.ones(8, device=DEVICE)}, ValueError, r"x_weight: expected shape \[40\]"),
        ({"x_weight": 1.0}, TypeError, r"x_weight: expected a Tensor, got float"),
        ({"x_weight": torch.ones(40, device=DEVICE, dtype=torch.int32)}, TypeError, r"x_weight: expected dtype"),
        ({"x_weight": torch.ones(40, device="meta")}, ValueError, r"x_weight: expected the device of x"),
        ({"residual": torch.ones(2, 3, 41, device=DEVICE)}, ValueError, r"residual: expected the shape of x"),
        ({"gate": torch.ones(41, device=DEVICE)}, ValueError, r"gate: got \[41\]"),
        ({"eps": "small"}, TypeError, r"eps: expected a float"),
        ({"rounding": "twice"}, ValueError, r"rounding: expected one of"),
    ],
)
@pytest.mark.parametrize("site", SITES[2:])
def test_bad_arguments_are_named(site: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    op = norm_scale_residual if site == "norm_residual" else norm_scale_residual_norm_scale_shift
    x = torch.ones(2, 3, 40, device=DEVICE)
    with pytest.raises(error, match=f"^{message}"):
        op(**{"x": x, "residual": x} | changes)  # type: ignore[operator]
