"""The tables of docs/kernels.md that show what the benchmarks of ops measured."""

from collections.abc import Sequence
from typing import Any

from .contestants import AUTOTUNED, COMPILED, EAGER, SINGLE, UNFUSED
from .norm.cells import Cell
from .qk.cells import QKCell
from .results import CellResult, Run

Table = list[str]
"""Lines of Markdown: the header, the line below it, the rows."""

Rows = Sequence[tuple[str, str]]
"""The label of each row and the name of its cell."""

NORM_IN_KERNELS: Rows = (
    ("`norm_scale_shift`, 128 x 3072, bf16", "nss/128x3072/sample/bf16"),
    ("4096 x 3072", "nss/4096x3072/sample/bf16"),
    ("27030 x 3072", "nss/27030x3072/sample/bf16"),
    ("32760 x 1536, fp32 modulation", "nss/32760x1536/sample/bf16/mod-fp32"),
    ("75600 x 5120, fp32 modulation", "nss/75600x5120/sample/bf16/mod-fp32"),
    ("`scale_residual_norm_scale_shift`, 128 x 3072, bf16", "srnss/128x3072/sample/bf16"),
    ("4096 x 3072", "srnss/4096x3072/sample/bf16"),
    ("27030 x 3072", "srnss/27030x3072/sample/bf16"),
    ("32760 x 1536, fp32 modulation", "srnss/32760x1536/sample/bf16/mod-fp32"),
    ("75600 x 5120, fp32 modulation", "srnss/75600x5120/sample/bf16/mod-fp32"),
    ("with affine and modulation: `norm_scale_shift`, 128 x 4096, per token", "nss/128x4096/token/bf16/affine"),
    ("4096 x 3072, per token", "nss/4096x3072/token/bf16/affine"),
    ("4096 x 3072", "nss/4096x3072/sample/bf16/affine"),
    ("`scale_residual_norm_scale_shift`, 1024 x 3072, per token", "srnss/1024x3072/token,gate-sample/bf16/affine"),
    ("4096 x 3072", "srnss/4096x3072/sample/bf16/affine"),
    ("with tables: `norm_scale_shift`, 4096 x 3072", "nss/4096x3072/sample/bf16/tables"),
    ("`scale_residual_norm_scale_shift`, 4096 x 3072", "srnss/4096x3072/sample/bf16/tables"),
)
QK_IN_KERNELS: Rows = (
    ("Qwen-Image 1024x1024, joint", "Qwen-Image 1024x1024, joint"),
    ("Qwen-Image 512x512, joint", "Qwen-Image 512x512, joint"),
    ("HunyuanVideo 848x480x65, dual-stream", "HunyuanVideo 848x480x65, dual"),
    ("HunyuanVideo 848x480x65, single-stream", "HunyuanVideo 848x480x65, single"),
    ("Wan2.1-1.3B 480p", "Wan2.1-1.3B 480p, self"),
    ("Wan2.2-TI2V-5B 704p", "Wan2.2-TI2V-5B 704p, self"),
    ("Wan2.2-A14B 720p", "Wan2.2-A14B 720p, self"),
    ("128 tokens, 24 heads of 128", "128 tokens"),
    ("1024 tokens", "1024 tokens"),
    ("27030 tokens, heads of 64", "heads of 64"),
    ("heads of 96", "heads of 96"),
    ("heads of 256", "heads of 256"),
    ("heads of 40", "heads of 40"),
    ("float16", "fp16"),
    ("float32", "fp32"),
    ("across heads, fp32", "across heads, fp32"),
    ("norm alone", "norm alone"),
)


def norm_in_kernels(run: Run[Cell]) -> Table:
    """The eager law's times and its share of the speed of light, beside the others' times."""
    rows = []
    for label, r in _results(run, NORM_IN_KERNELS):
        ours = r.us(EAGER) or float("nan")
        share = f"{_time(ours)} ({r.light_us / ours:.0%})"
        rows.append(
            [label, _time(r.light_us), share, _time(r.us("sglang")), _time(r.us("comfy-kitchen")), _compiled(r), _time(r.us(UNFUSED))]
        )
    return _table(["light", "ditnorm", "sglang", "comfy-kitchen", "torch.compile", "eager PyTorch"], rows)


def qk_in_kernels(run: Run[QKCell]) -> Table:
    """Both laws' times and the eager one's share of a copy's bandwidth, beside the others'
    times.
    """
    rows = []
    for label, r in _results(run, QK_IN_KERNELS):
        ours = r.us(EAGER) or float("nan")
        copy = f"{r.cell.bytes / (ours * 1e-6) / run.copy_bytes_per_second * 100:.0f} %"
        times = [r.light_us, r.us(SINGLE), ours]
        others = [r.us(UNFUSED), _fastest(r, COMPILED, AUTOTUNED), _sglang(r), r.us("comfy-kitchen")]
        rows.append([label, f"{r.megabytes:.1f}", *map(_time, times), copy, *map(_time, others)])
    header = ["MB", "light", '`"single"`', '`"eager"`', "copy", "eager PyTorch", "torch.compile", "sglang", "comfy-kitchen"]
    return _table(header, rows)


def _results(run: Run[Any], rows: Rows) -> list[tuple[str, CellResult[Any]]]:
    found = {r.cell.name: r for r in run.results}
    return [(label, found[name]) for label, name in rows]


def _compiled(r: CellResult[Any]) -> str:
    default, autotuned = r.us(COMPILED), r.us(AUTOTUNED)
    return _time(default) + ("" if autotuned is None else f" ({_time(autotuned)})")


def _sglang(r: CellResult[Any]) -> float | None:
    return _fastest(r, *(name for name in r.entries if name.startswith("sglang")))


def _fastest(r: CellResult[Any], *names: str) -> float | None:
    return min((us for name in names if (us := r.us(name)) is not None), default=None)


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
