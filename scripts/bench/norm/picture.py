"""The picture of a run: how much of the speed of light each contestant reaches, by megabytes
moved.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..contestants import AUTOTUNED, COMPILED, EAGER, SINGLE, UNFUSED
from ..results import CellResult, Run
from .cells import ABBREVIATIONS, Cell

# Marker, colour (Okabe and Ito's, which colour-blind readers can tell apart), size; the last drawn
# lies on top.
STYLES = {
    UNFUSED: ("x", "#999999", 28),
    COMPILED: ("v", "#CC79A7", 26),
    AUTOTUNED: ("^", "#882255", 26),
    "liger": ("P", "#F0E442", 26),
    "comfy-kitchen": ("s", "#E69F00", 22),
    "sglang triton": ("D", "#56B4E9", 20),
    "sglang": ("D", "#0072B2", 24),
    EAGER: ("o", "#D55E00", 34),
    SINGLE: ("o", "#009E73", 40),
}
BANDS = (0.85, 0.95)


def draw(run: Run[Cell], path: Path) -> None:
    """One panel for each op; all cells of the run that the fast kernels serve."""
    results = [r for r in run.results if r.cell.aligned]
    ops = [op for op in ABBREVIATIONS if any(r.cell.op == op for r in results)]
    figure, panels = plt.subplots(1, len(ops), figsize=(5.6 * len(ops), 5.4), sharey=True, squeeze=False, layout="constrained")
    for panel, op in zip(panels[0], ops, strict=True):
        _panel(panel, op, [r for r in results if r.cell.op == op])
    panels[0][0].set_ylabel("share of the speed of light")
    handles = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    order = [name for name in reversed(STYLES) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=min(9, len(order)), frameon=False)
    environment = run.environment
    figure.suptitle(
        f"One call of each op on {environment['gpu']}: higher is better; 100 % is a plain copy kernel that moves the same bytes\n"
        f"torch {environment['torch']}, driver {environment['driver']}, copy bandwidth {run.copy_bytes_per_second / 1e12:.2f} TB/s",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(panel: Axes, op: str, results: list[CellResult[Cell]]) -> None:
    for share in (*BANDS, 1.0):
        panel.axhline(share, color="black", linewidth=0.8 if share < 1 else 1.2, linestyle="--" if share < 1 else "-", zorder=1)
    for layer, (name, (marker, colour, size)) in enumerate(STYLES.items()):
        points = [(r.megabytes, r.light_us / us) for r in results if (us := r.us(name)) is not None]
        if points:
            megabytes, shares = zip(*points, strict=True)
            line = 1.2 if marker == "x" else 0.0
            panel.scatter(megabytes, shares, size, colour, marker=marker, label=name, zorder=2 + layer, linewidths=line)
    panel.set_xscale("log")
    panel.set_ylim(0, 1.08)
    panel.set_yticks([0, 0.2, 0.4, 0.6, *BANDS, 1.0], ["0", "20 %", "40 %", "60 %", "85 %", "95 %", "100 %"])
    panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlabel("megabytes moved")
    panel.set_title(op)
    panel.grid(alpha=0.25)
