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

from ditnorm.functional import scale_residual

FILES = sorted((Path(__file__).parent / "golden").glob("*.pt"))
RECORDS = [
    pytest.param(record, id=f"{path.stem}-{'norms' if 'layer' in record['results'] else 'laws'}-{record['inputs']['x'].shape[-1]}")
    for path in FILES
    for record in torch.load(path, weights_only=True)["records"]
]


def test_there_are_records_and_they_say_where_they_come_from() -> None:
    assert RECORDS
    for path in FILES:
        assert set(torch.load(path, weights_only=True)["about"]) == {"gpu", "torch", "date"}


@pytest.mark.parametrize("record", RECORDS)
def test_the_replay_equals_aten(record: dict[str, dict[str, Tensor]]) -> None:
    results = record["results"]
    if "layer" in results:
        x = record["inputs"]["x"].float()
        assert torch.equal(aten_replay.layer_norm(x, None, eps=1e-6), results["layer"])
        assert torch.equal(aten_replay.rms_norm(x, None, eps=1e-6), results["rms"])
    else:
        weight = record["inputs"]["weight"]
        assert torch.equal(aten_replay.rms_norm(record["inputs"]["residual"], None, weight, 1e-6), results["rms_y"])


@compiled_only
@pytest.mark.sanitize
@pytest.mark.parametrize("record", RECORDS)
def test_the_kernels_equal_aten(record: dict[str, dict[str, Tensor]]) -> None:
    given = {name: t.to(DEVICE) for name, t in record["inputs"].items()}
    actual = _norms(**given) if "layer" in record["results"] else _laws(**given)
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
