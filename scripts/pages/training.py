"""What is written of training steps."""

from pathlib import Path

from bench.models.variants import EAGER, PATCHED
from bench.training.report import layer_counts

from .blocks import table
from .models import charts
from .records import commands, measured, runs_of, where

HOST = "\n- *host ms*: until Python had come to its end; near the step's time the GPU waited for it"


def written(docs: Path) -> dict[str, str]:
    """Each block's text."""
    found = measured(docs, "training")
    rows = []
    on_host = any("host_ms" in column for m in found for columns in m.entry["plans"].values() for column in columns.values())
    for m in found:
        layers = layer_counts(m.entry)
        for plan, columns in m.entry["plans"].items():
            eager = columns[EAGER.name]["step_ms"]
            for name, column in columns.items():
                peak = column["peak_gb"]
                numbers = [f"{column['step_ms']:,.1f}", f"{eager / column['step_ms']:.2f}", f"{column['shares']['busy_ms']:,.1f}"]
                numbers += [f"{column['host_ms']:,.1f}" if "host_ms" in column else ""] if on_host else []
                numbers += ["" if peak is None else f"{peak:.2f}", f"{column['first_step_s']:.1f}"]
                rows.append([m.entry["title"], m.card, layers, plan, name, *numbers])
    header = [
        "",
        "GPU",
        "layers",
        "trained",
        "",
        "step ms",
        "times eager's speed",
        "GPU ms",
        *(["host ms"] if on_host else []),
        "peak GB",
        "first step s",
    ]
    listed = "; ".join(dict.fromkeys(where(run) for run in runs_of(found)))
    return {
        "training": f"""Measured {listed}.

{commands(runs_of(found))}

{charts("Time of one training step of each model in each column", "training", found)}

{table(header, rows, 5)}

- *step ms*: median wall time of forward, backward and AdamW
- *GPU ms*: the sum over the step's kernels{HOST if on_host else ""}
- *peak GB*: the most GPU memory in use
- *first step s*: with what PyTorch and the compiler do once""",
    }


def in_words(docs: Path) -> str:
    """The largest gain."""
    found = [(m, plan, columns) for m in measured(docs, "training") for plan, columns in m.entry["plans"].items()]
    m, plan, columns = min(found, key=lambda f: f[2][PATCHED.name]["step_ms"] / f[2][EAGER.name]["step_ms"])
    before, after = columns[EAGER.name], columns[PATCHED.name]
    layers = sum(m.entry["layers"].values())
    model = m.entry["title"].rpartition(" ")[0]
    memory = "" if before["peak_gb"] is None else f" and {before['peak_gb']:.1f} → {after['peak_gb']:.1f} GB"
    return f"{plan} on {layers} layers of {model}, {before['step_ms']:.0f} → {after['step_ms']:.0f} ms{memory} a step on {m.card}"
