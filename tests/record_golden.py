"""Records what diffusers' unfused expressions compute on a CUDA GPU, as ``tests/golden/<GPU>.pt``
for ``test_golden.py``.

    PYTHONPATH=. python tests/record_golden.py FOLDER

CUDA's ``rsqrtf`` isn't always correctly rounded, and the host build's is. So only rows are kept
whose reciprocal roots are: told by ``aten_replay``, which shares no code with the kernels. That its
means equal ATen's in every row is asserted on the way. Its tanh and exponential have other last
bits, too: of activations rows are kept that are the exact result, rounded.
"""

import datetime
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
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
# Of fewer than 16 rows diffusers' RMSNorm adds up in another order.
SANDWICHES = {(torch.bfloat16, 40): 16, (torch.bfloat16, 264): 16, (torch.float32, 136): 16}
ACTIVATIONS = {(torch.bfloat16, 48): 8, (torch.float16, 48): 8}
GRADIENTS = {(torch.bfloat16, 48): 8, (torch.bfloat16, 1152): 2, (torch.float32, 520): 2}


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


def sandwiches(x: Tensor, residual: Tensor, mod: Tensor, weight: Tensor, x_weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Z-Image's sites. ``mod`` [1, 3D]: shift, scale, gate."""
    shift, scale, gate = mod[:, None].chunk(3, dim=-1)

    def norm(t: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(RMSNorm(t.shape[-1], eps=EPS).cuda(), {"weight": weight}, (t,))

    sandwich_r, branch_r = residual + gate * norm(x, x_weight), residual + gate * x
    results = {
        "diffusers_rms_y": norm(residual, weight) * (1 + scale) + shift,
        "branch_r": branch_r,
        "branch_y": norm(branch_r, weight) * (1 + scale) + shift,
        "sandwich_r": sandwich_r,
        "sandwich_y": norm(sandwich_r, weight) * (1 + scale) + shift,
    }
    return results, torch.stack([diffusers_rms_rows(t) for t in (x, residual, branch_r, sandwich_r)]).all(0)


def activations(x: Tensor, residual: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """``residual`` stands in for SwiGLU's value."""
    results = {"gelu": F.gelu(x, approximate="tanh"), "swiglu": F.silu(x) * residual}
    exact = {"gelu": F.gelu(x.double(), approximate="tanh").to(x.dtype), "swiglu": F.silu(x.double()).to(x.dtype) * residual}
    return results, torch.stack([(results[name] == exact[name]).all(-1).flatten().cpu() for name in results]).all(0)


def gradients(x: Tensor, residual: Tensor, mod: Tensor, weight: Tensor, dy: Tensor, dr: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Those of rows, through Qwen-Image's sites and through a plain RMSNorm."""
    shape = x.shape[-1:]
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y, gate = diffusers.qwen_modulate(diffusers.layer_norm(residual, shape, eps=EPS), mod)
    (layer,) = torch.autograd.grad(y, residual, dy)
    (rms,) = torch.autograd.grad(diffusers.rms_norm(residual, shape, weight, EPS), residual, dy)
    r = residual + gate * x
    y, _ = diffusers.qwen_modulate(diffusers.layer_norm(r, shape, eps=EPS), mod)
    d_residual, d_x = torch.autograd.grad((y, r), (residual, x), (dy, dr))
    keep = torch.stack([layer_rows(residual.detach()), layer_rows(r.detach()), rms_rows(residual.detach())]).all(0)
    return {"d_layer": layer, "d_rms": rms, "d_residual": d_residual, "d_x": d_x}, keep


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


def diffusers_rms_rows(x: Tensor) -> Tensor:
    mean = x.float().pow(2).mean(-1, keepdim=True)
    replayed = aten_replay.mean_of_squares(x[0])
    wrong = int((mean.flatten().cpu() != replayed).sum())
    if wrong:
        raise AssertionError(f"{wrong} of {CANDIDATES} means differ from ATen's at D = {x.shape[-1]}: the order has changed")
    return rounded_correctly((mean + EPS).rsqrt(), replayed, x)


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


def more_inputs(dtype: torch.dtype, width: int, *names: str) -> dict[str, Tensor]:
    given = inputs(dtype, width) | {name: torch.randn(1, CANDIDATES, width).to(dtype) for name in ("dy", "dr")}
    given["x_weight"] = torch.randn(width).to(dtype)
    return {name: given[name].cuda() for name in names}


def kept(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: (t[:, rows] if t.shape[1:2] == (CANDIDATES,) else t).detach().cpu().clone() for name, t in tensors.items()}


def chosen(compute: Callable[..., tuple[dict[str, Tensor], Tensor]], given: dict[str, Tensor], count: int) -> dict[str, dict[str, Tensor]]:
    """What ``compute`` makes of so many of the rows that may be kept."""
    results, keep = compute(**given)
    rows = keep.nonzero()[:count, 0]
    if len(rows) < count:
        raise AssertionError(f"{len(rows)} of {CANDIDATES} rows may be kept, {count} are wanted")
    return {"inputs": kept(given, rows), "results": kept(results, rows)}


def record() -> dict[str, object]:
    torch.manual_seed(0)
    records = []
    for (dtype, width), count in LAWS.items():
        records.append(chosen(laws, {name: t.cuda() for name, t in inputs(dtype, width).items()}, count))
    for width, count in NORMS.items():
        x = inputs(torch.bfloat16, width)["residual"].cuda()
        wide = x.float()
        rows = (layer_rows(wide) & rms_rows(wide)).nonzero()[:count, 0]
        results = {"layer": diffusers.layer_norm(wide, (width,), eps=EPS), "rms": diffusers.rms_norm(wide, (width,), None, EPS)}
        records.append({"inputs": kept({"x": x}, rows), "results": kept(results, rows)})
    for (dtype, width), count in SANDWICHES.items():
        records.append(chosen(sandwiches, more_inputs(dtype, width, "x", "residual", "mod", "weight", "x_weight"), count))
    for (dtype, width), count in ACTIVATIONS.items():
        records.append(chosen(activations, more_inputs(dtype, width, "x", "residual"), count))
    for (dtype, width), count in GRADIENTS.items():
        records.append(chosen(gradients, more_inputs(dtype, width, "x", "residual", "mod", "weight", "dy", "dr"), count))
    about = {"gpu": torch.cuda.get_device_name(), "torch": str(torch.__version__), "date": datetime.date.today().isoformat()}
    return {"about": about, "records": records}


if __name__ == "__main__":
    recorded = record()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{torch.cuda.get_device_name().replace(' ', '_')}.pt"
    torch.save(recorded, path)
    print(f"{path}: {path.stat().st_size} bytes")
