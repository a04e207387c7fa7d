"""The kernels' ``"eager"`` against bits that ATen computed on a GPU (``record_golden.py``), so that
the host build is held to them too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import aten_replay
from support.cases import DEVICE, compiled_only, norm_scale_shift, scale_residual_norm_scale_shift
from torch import Tensor

from ditnorm.functional import gelu, norm_scale_residual, norm_scale_residual_norm_scale_shift, scale_residual, swiglu

EPS = 1e-6
FILES = sorted((Path(__file__).parent / "golden").glob("*.pt"))
KINDS = {"layer": "norms", "qwen_y": "laws", "sandwich_y": "sandwiches", "gelu": "activations", "d_x": "gradients"}
"""One of the results of each kind of record."""


def kind_of(record: dict[str, dict[str, Tensor]]) -> str:
    (kind,) = (kind for name, kind in KINDS.items() if name in record["results"])
    return kind


RECORDS = [
    pytest.param(record, id=f"{path.stem}-{kind_of(record)}-{record['inputs']['x'].shape[-1]}")
    for path in FILES
    for record in torch.load(path, weights_only=True)["records"]
]


def test_there_are_records_and_they_say_where_they_come_from() -> None:
    assert RECORDS
    for path in FILES:
        assert set(torch.load(path, weights_only=True)["about"]) == {"gpu", "torch", "date"}


@pytest.mark.parametrize("record", RECORDS)
def test_the_replay_equals_aten(record: dict[str, dict[str, Tensor]]) -> None:
    given, results = record["inputs"], record["results"]
    match kind_of(record):
        case "norms":
            x = given["x"].float()
            assert torch.equal(aten_replay.layer_norm(x, None, eps=EPS), results["layer"])
            assert torch.equal(aten_replay.rms_norm(x, None, eps=EPS), results["rms"])
        case "laws":
            assert torch.equal(aten_replay.rms_norm(given["residual"], None, given["weight"], EPS), results["rms_y"])
        case "sandwiches":
            _, _, gate = given["mod"][:, None].chunk(3, dim=-1)
            branch = aten_replay.diffusers_rms_norm(given["x"], given["x_weight"], EPS)
            assert torch.equal(given["residual"] + gate * branch, results["sandwich_r"])
        case "gradients":
            weight, dy = given["weight"], given["dy"]
            assert torch.equal(aten_replay.norm_backward(dy, given["residual"], weight, EPS, centred=False), results["d_rms"])


@compiled_only
@pytest.mark.sanitize
@pytest.mark.parametrize("record", RECORDS)
def test_the_kernels_equal_aten(record: dict[str, dict[str, Tensor]]) -> None:
    given = {name: t.to(DEVICE) for name, t in record["inputs"].items()}
    computed = {"norms": _norms, "laws": _laws, "sandwiches": _sandwiches, "activations": _activations, "gradients": _gradients}
    actual = computed[kind_of(record)](**given)
    assert actual.keys() == record["results"].keys()
    for name, expected in record["results"].items():
        assert torch.equal(actual[name].cpu(), expected), name


def _norms(x: Tensor) -> dict[str, Tensor]:
    return {norm: norm_scale_shift(x.float(), norm=norm, rounding="eager") for norm in ("layer", "rms")}


def _laws(x: Tensor, residual: Tensor, mod: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    shift, scale, gate = mod.chunk(3, dim=-1)
    shift_row, scale_row, gate_row = table.float().unbind(0)
    eager: dict[str, Any] = {"rounding": "eager"}
    qwen_y2, qwen_r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **eager)
    assert torch.equal(scale_residual(residual, x, gate, **eager), qwen_r)
    wan_y2, wan_r = scale_residual_norm_scale_shift(
        residual, x, gate, gate_table=gate_row, weight=weight.float(), bias=bias.float(), norm="fp32_layer", **eager
    )
    assert torch.equal(scale_residual(residual, x, gate, gate_table=gate_row, **eager), wan_r)
    return {
        "qwen_y": norm_scale_shift(residual, scale, shift, **eager),
        "qwen_r": qwen_r,
        "qwen_y2": qwen_y2,
        "wan_y": norm_scale_shift(residual, scale, shift, scale_table=scale_row, shift_table=shift_row, norm="fp32_layer", **eager),
        "wan_r": wan_r,
        "wan_y2": wan_y2,
        "rms_y": norm_scale_shift(residual, weight=weight, norm="rms", **eager),
    }


def _sandwiches(x: Tensor, residual: Tensor, mod: Tensor, weight: Tensor, x_weight: Tensor) -> dict[str, Tensor]:
    shift, scale, gate = mod.chunk(3, dim=-1)
    norm: dict[str, Any] = {"weight": weight, "norm": "diffusers_rms", "rounding": "eager"}
    law: dict[str, Any] = {"eps": EPS, "rounding": "eager"}
    branch_y, branch_r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **norm)
    sandwich_y, sandwich_r = norm_scale_residual_norm_scale_shift(residual, x, x_weight, gate, scale, shift, weight=weight, **law)
    assert torch.equal(norm_scale_residual(residual, x, x_weight, gate, **law), sandwich_r)
    return {
        "diffusers_rms_y": norm_scale_shift(residual, scale, shift, **norm),
        "branch_r": branch_r,
        "branch_y": branch_y,
        "sandwich_r": sandwich_r,
        "sandwich_y": sandwich_y,
    }


def _activations(x: Tensor, residual: Tensor) -> dict[str, Tensor]:
    return {"gelu": gelu(x, rounding="eager"), "swiglu": swiglu(x, residual, rounding="eager")}


def _gradients(x: Tensor, residual: Tensor, mod: Tensor, weight: Tensor, dy: Tensor, dr: Tensor) -> dict[str, Tensor]:
    shift, scale, gate = mod.chunk(3, dim=-1)
    eager: dict[str, Any] = {"rounding": "eager"}
    x, residual = x.requires_grad_(), residual.requires_grad_()
    (layer,) = torch.autograd.grad(norm_scale_shift(residual, scale, shift, **eager), residual, dy)
    (rms,) = torch.autograd.grad(norm_scale_shift(residual, weight=weight, norm="rms", **eager), residual, dy)
    outputs = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **eager)
    d_residual, d_x = torch.autograd.grad(outputs, (residual, x), (dy, dr))
    return {"d_layer": layer, "d_rms": rms, "d_residual": d_residual, "d_x": d_x}
