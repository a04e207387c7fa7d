"""Records what diffusers' unfused expressions compute on a CUDA GPU, as ``tests/golden/<GPU>.pt``
for ``test_golden.py``.

    PYTHONPATH=. python tests/record_golden.py FOLDER

CUDA's ``rsqrtf`` isn't always correctly rounded, and the host build's is. So only rows are kept
whose reciprocal roots are: told by ``aten_replay``, which shares no code with the kernels. That its
means equal ATen's in every row is asserted on the way.
"""

import datetime
import sys
from pathlib import Path

import torch
from support import aten_replay
from support import expressions as diffusers
from torch import Tensor

CANDIDATES = 256
EPS = 1e-6
# Rows to keep by width: few bits of a half-precision result depend on the order of a reduction, so
# these are for the laws...
LAWS = {(torch.bfloat16, 20): 8, (torch.bfloat16, 48): 8, (torch.float16, 64): 8, (torch.bfloat16, 520): 2, (torch.bfloat16, 1152): 1}
# ... and float32 norms, in which nearly every row does, for the order.
NORMS = {20: 8, 48: 8, 64: 8, 520: 4, 1024: 1, 1152: 2, 2432: 1, 3072: 1}


def laws(x: Tensor, residual: Tensor, mod: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Results by name, and which rows may be kept. ``mod`` [1, 3D]: shift, scale, gate; ``table``
    [3, D] in the dtype of ``x``.
    """
    width = x.shape[-1]
    normed = diffusers.layer_norm(residual, (width,), eps=EPS)
    qwen_y, gate = diffusers.qwen_modulate(normed, mod)
    qwen_r = residual + gate * x
    qwen_y2, _ = diffusers.qwen_modulate(diffusers.layer_norm(qwen_r, (width,), eps=EPS), mod)
    wan_shift, wan_scale, wan_gate = (table.float()[None] + mod.view(1, 3, width).float()).chunk(3, dim=1)
    wan_r = diffusers.wan_residual(residual, x, wan_gate)
    rms = diffusers.rms_norm(residual, (width,), weight, EPS)
    results = {
        "qwen_y": qwen_y,
        "qwen_r": qwen_r,
        "qwen_y2": qwen_y2,
        "wan_y": diffusers.wan_norm(residual, wan_scale, wan_shift),
        "wan_r": wan_r,
        "wan_y2": diffusers.wan_affine_norm(wan_r, weight.float(), bias.float()),
        "rms_y": rms,
    }
    keep = [layer_rows(t) for t in (residual, qwen_r, wan_r)] + [rms_rows(residual)]
    return results, torch.stack(keep).all(0)


def layer_rows(x: Tensor) -> Tensor:
    """The rows of ``x`` [1, N, D] whose statistics on the GPU are the replay's; a mean that isn't
    is an error.
    """
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
    replayed_mean, variance = aten_replay.moments(x[0])
    wrong = int((mean.flatten().cpu() != replayed_mean).sum())
    if wrong:
        raise AssertionError(f"{wrong} of {CANDIDATES} means differ from ATen's at D = {x.shape[-1]}: the order has changed")
    return rounded_correctly(rstd, variance, x)


def rms_rows(x: Tensor) -> Tensor:
    _, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, EPS)
    return rounded_correctly(rstd, aten_replay.mean_square(x[0]), x)


def rounded_correctly(rstd: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    same = rstd.flatten().cpu() == aten_replay.reciprocal_root(variance, EPS)
    print(f"{x.dtype} D = {x.shape[-1]}: {int(same.sum())} of {CANDIDATES} reciprocal roots as replayed")
    if same.float().mean() < 0.5:  # rsqrtf errs by an ulp in a minority of arguments
        raise AssertionError("most reciprocal roots differ: the variance is not what the replay computes")
    return same


def inputs(dtype: torch.dtype, width: int) -> dict[str, Tensor]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size).to(dtype)

    scatter = (torch.rand(1, CANDIDATES, 1) * 3).to(dtype)
    vectors = {"mod": normal(1, 3 * width) * 0.5, "table": normal(3, width), "weight": normal(width), "bias": normal(width)}
    return {"x": normal(1, CANDIDATES, width), "residual": normal(1, CANDIDATES, width) * scatter + 0.5, **vectors}


def kept(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: (t[:, rows] if t.shape[1:2] == (CANDIDATES,) else t).cpu().clone() for name, t in tensors.items()}


def record() -> dict[str, object]:
    torch.manual_seed(0)
    records = []
    for (dtype, width), count in LAWS.items():
        given = {name: t.cuda() for name, t in inputs(dtype, width).items()}
        results, keep = laws(**given)
        rows = keep.nonzero()[:count, 0]
        records.append({"inputs": kept(given, rows), "results": kept(results, rows)})
    for width, count in NORMS.items():
        x = inputs(torch.bfloat16, width)["residual"].cuda()
        wide = x.float()
        rows = (layer_rows(wide) & rms_rows(wide)).nonzero()[:count, 0]
        results = {"layer": diffusers.layer_norm(wide, (width,), eps=EPS), "rms": diffusers.rms_norm(wide, (width,), None, EPS)}
        records.append({"inputs": kept({"x": x}, rows), "results": kept(results, rows)})
    about = {"gpu": torch.cuda.get_device_name(), "torch": str(torch.__version__), "date": datetime.date.today().isoformat()}
    return {"about": about, "records": records}


if __name__ == "__main__":
    recorded = record()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{torch.cuda.get_device_name().replace(' ', '_')}.pt"
    torch.save(recorded, path)
    print(f"{path}: {path.stat().st_size} bytes")
