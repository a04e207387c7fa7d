"""What is written of whole models: README's first screen, docs/results.md."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.models import accuracy
from bench.models.catalogue import MODELS
from bench.models.variants import BF16, EAGER, PATCHED, PRECOMPUTED, SINGLE, VARIANTS

from .blocks import table
from .records import Measured, by_device, card, commands, measured, newest, runs_of, span, where

COMPILED, PATCHED_COMPILED = "compiled", "patched + compiled"
MASKED = "hunyuan-video-1.5"
"""Gains most, for a reason of its own."""

Column = Mapping[str, Any]

_ALL: dict[str, tuple[str, Callable[[Column, Mapping[str, Any]], str]]] = {
    "step ms": ("median wall time of one denoising step", lambda c, e: f"{c['step_ms']:,.1f}"),
    "GPU ms": ("the sum over the step's kernels", lambda c, e: f"{c['shares']['busy_ms']:,.1f}"),
    "first step s": ("with all that PyTorch, a compiler or a table of modulations does once", lambda c, e: f"{c['first_step_s']:.1f}"),
    "kernels": ("launched in one step", lambda c, e: f"{c['shares']['kernels']:,}"),
    "peak GB": (
        "the most GPU memory in use in a step, weights included",
        lambda c, e: "" if c["peak_gb"] is None else f"{c['peak_gb']:.2f}",
    ),
    "other": ("share of the kernels' time outside matrix products and attention", lambda c, e: f"{c['other_share']:.1%}"),
    "equal steps": (
        "so many of the first steps left latents with all the bits of eager's; empty where that isn't promised",
        lambda c, e: f"{c['steps_identical']} of {e['steps_compared']}" if "steps_identical" in c else "",
    ),
}
_VARIANTS = {
    EAGER.name: "diffusers as it is",
    PATCHED.name: '`ditnorm.patch_model`, `rounding="eager"`',
    PRECOMPUTED.name: "that and `ditnorm.precompute_modulation`",
    SINGLE.name: '`rounding="single"`, which isn\'t bit-identical',
    COMPILED: "`compile_repeated_blocks(fullgraph=True)`, or `torch.compile` of each block where a model names none",
    PATCHED_COMPILED: "the first and the last",
    BF16.name: "the same before its weights were quantised",
}


def written(docs: Path) -> dict[str, str]:
    """Each block's text."""
    found = sorted(measured(docs, "transformers"), key=place)
    return {
        "headline": _headline(newest(found)),
        "models": _main(newest(found)),
        "largest-gain": _largest_gain(newest(found)),
        "steps": _steps(found),
        "limits": _limits(newest(found)),
        "accuracy": _accuracy(found),
        "configurations": _configurations(newest(found)),
    }


def place(m: Measured) -> int:
    """The order of tables: the catalogue's."""
    names = list(MODELS)
    name = m.key.partition(",")[0]  # of "qwen-image, float8-row"
    return names.index(name) if name in MODELS else len(names)


def saved(m: Measured) -> float:
    """The share of a step's time that patching saves."""
    return 1 - m.entry["columns"][PATCHED.name]["step_ms"] / m.entry["columns"][EAGER.name]["step_ms"]


def peaks(m: Measured, name: str) -> float | None:
    return m.entry["columns"][name]["peak_gb"] if name in m.entry["columns"] else None


def equal_steps(found: list[Measured]) -> str:
    """A sentence: whether latents were equal in every row."""
    columns = [(m, m.entry["columns"][PATCHED.name]) for m in found]
    different = [m.entry["title"] for m, c in columns if c["steps_identical"] != m.entry["steps_compared"]]
    compared = {m.entry["steps_compared"] for m, _ in columns}
    steps = "/".join(map(str, sorted(compared)))
    if different:
        return f"Latents differed in {', '.join(different)}."
    return f"In every row the latents equalled eager's, bit for bit, after each of the first {steps} steps."


def _headline(found: list[Measured]) -> str:
    shares = sorted(saved(m) for m in found)
    lower = [(peaks(m, EAGER.name) or 0) - (peaks(m, PATCHED.name) or 0) for m in found]
    return (
        f"**{shares[0] * 100:.0f} to {shares[-1]:.0%} less time a denoising step, {statistics.median(shares):.0%} in the median of "
        f"{len(found)} models, and up to {max(lower):.1f} GB less memory at its peak. The same pictures, bit for bit. One line.**"
    )


def _main(found: list[Measured]) -> str:
    several = len({m.card for m in found}) > 1
    rows = []
    for m in found:
        columns = m.entry["columns"]
        row = [title(m.entry), m.card] if several else [title(m.entry)]
        row += [f"{columns[EAGER.name]['step_ms']:,.1f} ms", f"{columns[PATCHED.name]['step_ms']:,.1f} ms", f"**{-saved(m):+.0%}**"]
        row.append(f"{columns[COMPILED]['step_ms']:,.1f} ms" if COMPILED in columns else "")
        row.append(" → ".join("" if (gb := peaks(m, name)) is None else f"{gb:.1f}" for name in (EAGER.name, PATCHED.name)))
        rows.append(row)
    header = ["One denoising step, bfloat16", *(["GPU"] if several else []), "diffusers", "ditnorm", "", "torch.compile", "peak GB"]
    used = runs_of(found)
    partly = " In brackets: layers measured, of all." if any(_partial(m.entry) for m in found) else ""
    return f"{table(header, rows, 2 if several else 1)}\n\nMeasured {span(used)}. {equal_steps(found)}{partly}"


def _partial(entry: Mapping[str, Any]) -> bool:
    return bool(entry["layers"] != entry["all_layers"])


def title(entry: Mapping[str, Any]) -> str:
    """With the layers measured in brackets, where these aren't all."""
    return f"{entry['title']} ({layers(entry)})" if _partial(entry) else str(entry["title"])


def layers(entry: Mapping[str, Any]) -> str:
    """Measured layers of all."""
    return " + ".join(f"{n} of {entry['all_layers'][kind]}" for kind, n in entry["layers"].items())


def _largest_gain(found: list[Measured]) -> str:
    m = next((m for m in found if m.key == MASKED), None)
    if m is None:
        return ""
    before, after = (m.entry["columns"][name] for name in (EAGER.name, PATCHED.name))
    attention = [c["shares"]["attention_ms"] for c in (before, after)]
    other = [c["shares"]["busy_ms"] * c["other_share"] for c in (before, after)]
    return (
        f"HunyuanVideo-1.5's {saved(m):.0%} are mostly not about norms. Each of its blocks makes an attention mask of all pairs of tokens, "
        f"in a form that attention converts and reads slowly. ditnorm makes the same mask in the form that attention takes: "
        f"attention itself goes from {attention[0]:,.0f} to {attention[1]:,.0f} ms, all but attention and matrix products "
        f"from {other[0]:,.0f} to {other[1]:,.0f} ms."
    )


def _steps(found: list[Measured]) -> str:
    """A section for each device: the table of README with all columns, then everything."""
    return "\n\n".join(_device_section(device, of_device) for device, of_device in by_device(found).items())


def _device_section(device: str, found: list[Measured]) -> str:
    listed = "; ".join(dict.fromkeys(where(run) for run in runs_of(found)))
    return f"""## {device}

Measured {listed}.

{commands(runs_of(found))}

{main_table(found)}

{equal_steps(found)}

{charts("Time of one denoising step of each model in each column", "transformers", found)}

{full_table(found)}"""


def chart_name(record: str, device: str) -> str:
    """The picture of what a record has of a device."""
    return f"{record}-{card(device).lower()}.png"


def charts(what: str, record: str, found: list[Measured]) -> str:
    """The pictures of what a record has of some devices."""
    return "\n".join(f"![{what}, eager is 100 %, {card(device)}]({chart_name(record, device)})" for device in by_device(found))


def main_table(found: list[Measured], *others: str) -> str:
    """One line a model: its time in every column, and the change from eager's."""
    names = [n for n in (PATCHED.name, COMPILED, PATCHED_COMPILED, *others) if any(n in m.entry["columns"] for m in found)]
    rows = []
    for m in found:
        columns = m.entry["columns"]
        eager = columns[EAGER.name]["step_ms"]
        times = [f"{columns[n]['step_ms']:,.1f} ({columns[n]['step_ms'] / eager - 1:+.1%})" if n in columns else "" for n in names]
        rows.append([m.entry["title"], layers(m.entry), f"{eager:,.1f}", *times])
    return table(["ms of one denoising step", "layers", "eager", *names], rows)


def full_table(found: list[Measured]) -> str:
    """Everything measured: one line a model and column, and what the columns mean."""
    rows, used = [], dict.fromkeys(name for m in found for name in m.entry["columns"])
    for m in found:
        for name, column in m.entry["columns"].items():
            rows.append([m.entry["title"], f"{m.entry['tokens']:,}", name, *(shown(column, m.entry) for _, shown in _ALL.values())])
    legend = [f"- *{header}*: {meaning}" for header, (meaning, _) in _ALL.items()]
    legend += [f"- {name}: {_VARIANTS[name]}" for name in used]
    return table(["", "tokens", "", *_ALL], rows) + "\n\n" + "\n".join(legend)


def _limits(found: list[Measured]) -> str:
    """How long matrix products and attention take in each column, and what that leaves to gain."""
    names = (EAGER.name, PATCHED.name, COMPILED)
    rows = []
    for m in found:
        columns = m.entry["columns"]
        products = {name: columns[name]["shares"]["busy_ms"] * (1 - columns[name]["other_share"]) for name in names if name in columns}
        eager, patched = (columns[name]["shares"]["busy_ms"] for name in (EAGER.name, PATCHED.name))
        rows.append([m.entry["title"], m.card, *(f"{products[name]:,.1f}" if name in products else "" for name in names)])
        rows[-1] += [f"{eager / patched:.2f}", f"{eager / products[PATCHED.name]:.2f}"]
    return table(["ms of matrix products and attention", "GPU", *names, "times as fast", "at most"], rows, 2)


def _accuracy(found: list[Measured]) -> str:
    found = [m for m in found if "accuracy" in m.entry]
    names = [variant.name for variant in VARIANTS if variant.accuracy]
    parts = []
    for device, of_device in by_device(found).items():
        rows = [
            [m.entry["title"], accuracy.blocks(m.entry["accuracy"]), *(_error(name, m.entry["accuracy"]["errors"]) for name in names)]
            for m in of_device
        ]
        parts.append(f"{device}:\n\n{table(['', 'blocks', *names], rows)}\n\n{nearest(of_device)}")
    return "\n\n".join(parts)


def nearest(found: list[Measured]) -> str:
    """Which of "single" and compiled is nearer to float32, in words."""
    both = [(m.entry["title"], m.entry["accuracy"]["errors"]) for m in found if COMPILED in m.entry["accuracy"]["errors"]]
    nearer = [title for title, errors in both if errors[COMPILED]["relative"] < errors[SINGLE.name]["relative"]]
    if not both:
        return ""
    others = ' In the others `"single"` is nearer.' if len(nearer) < len(both) else ""
    if not nearer:
        return '`"single"` is nearer to float32 than compiled in each of them.'
    return f'Compiled is nearer to float32 than `"single"` in {", ".join(nearer)}.{others}'


def _error(name: str, errors: Mapping[str, Mapping[str, float]]) -> str:
    """One way's error; of "single" its change from eager's, too."""
    if name not in errors:
        return ""
    found = errors[name]
    change = f", {found['relative'] / errors[EAGER.name]['relative'] - 1:+.2%} ± {found['chance']:.2%}" if name == SINGLE.name else ""
    return f"{found['relative']:.3e} ({found['psnr']:.1f} dB{change})"


def _configurations(found: list[Measured]) -> str:
    return "\n".join(f"- {m.entry['title']}: `{m.entry['source']}`" for m in found)
