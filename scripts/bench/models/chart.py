"""The picture of what a benchmark of models found: bars, eager being 100 %."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from .variants import BF16, EAGER, VARIANTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch


def draw(groups: Mapping[str, Mapping[str, Any]], path: Path, what: str, device: str) -> None:
    """Time of ``what`` in each column of each group, by the text beside the group."""
    colours = {variant.name: variant.colour for variant in (*VARIANTS, BF16)}
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.9 * len(groups)), layout="constrained")
    height = 0.8 / max(map(len, groups.values()))
    for index, columns in enumerate(groups.values()):
        first = index - height * (len(columns) - 1) / 2
        eager = columns[EAGER.name]["step_ms"]
        for place, name in enumerate(name for name in colours if name in columns):
            ms = columns[name]["step_ms"]
            bar = axes.barh(first + place * height, 100 * ms / eager, height * 0.92, color=colours[name])
            axes.bar_label(bar, [f"{100 * ms / eager:.0f} %   {ms:,.0f} ms"], padding=3, fontsize=8)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(axes.get_xlim()[1] / 1.05, 100))
    axes.set(xlabel=f"time of {what}, eager = 100 %", title=device)
    axes.spines[["top", "right"]].set_visible(False)
    shown = [name for name in colours if any(name in columns for columns in groups.values())]
    patches = [Patch(color=colours[name]) for name in shown]
    figure.legend(patches, shown, loc="outside lower center", ncols=min(len(shown), 5), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
