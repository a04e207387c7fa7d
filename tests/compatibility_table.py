"""Writes docs/compatibility.md from the data of the tests in tests/compatibility; ``--check`` says
whether it is up to date.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from compatibility import matrix, parallel
from compatibility.feature import FAMILIES, ORDERS, Feature

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RELEASES = ROOT / "docs" / "diffusers.json"
GPUS = ROOT / "docs" / "compatibility.json"

INTRODUCTION = """\
# Compatibility

What else people do to a pipeline, and what ditnorm does then. This page is written by `tests/compatibility_table.py` from the data of
the tests in `tests/compatibility`: every cell below is a test.

A cell names what holds in all four orders:

{orders}

Each test checks that the output equals that of the unpatched model with the same feature (`torch.equal`; for Inductor the bound in
`compiled.py`), that the feature is in effect as on the unpatched model, that the fused ops ran, and that unpatching restores the model.
Runs are under `torch.no_grad`, but for those that train.

- **same**: as described.
- **bound**: as described, within a derived bound instead of bit for bit.
- **partly**: the rest is fused; patching names what isn't and why.
- **upstream fails**: so does the unpatched model, with the same error; the test shows it.
- **-**: the family has no such feature.

*Ran on* says where a row's tests have passed. CPU: in CI, or with `make test-all`. GPUs: in the newest run that was recorded there
(`pytest tests/compatibility --ran-on docs/compatibility.json`); families in brackets where not all of the row ran.

Of the guiders of modular pipelines those have rows that change the model or run it again; the others only combine its predictions.

Where activations are quantised and the linear layers fused, the remarks name the law, and the test looks at every linear layer of the
blocks. Layers of which the weights alone are quantised run as their own library runs them.

Each row of Qwen-Image, FLUX.1, HunyuanVideo and SD3 but for the quantised weights with other features is tested beside
`precompute_modulation`, too, which comes before the feature or after it (`tests/test_modulation_matrix.py`): the same output, and a way
back. Precomputing is refused where group offloading is on, and where a block isn't fused; if these come later, the table is given up with
a warning.

Tests of features that need a GPU or a package that isn't installed are skipped. `make test-all` runs every other cell. `make test` leaves
out some orders of rows marked *all*, in {long} these rows, all orders but one of
{sampled}, and all cells but one of rows marked *one*.
"""


def _listed(families: tuple[str, ...]) -> str:
    return f"{', '.join(families[:-1])} and {families[-1]}"


def page() -> str:
    orders = "\n".join(f"- **{order}**: {meaning}" for order, meaning in ORDERS.items())
    lines = [INTRODUCTION.format(orders=orders, sampled=_listed(matrix.IN_ONE_ORDER), long=_listed(matrix.LONG_GRAPHS))]
    for group, features in matrix.GROUPS.items():
        lines += [f"## {group}", "", f"| | {' | '.join(FAMILIES)} | Ran on | Remarks |", f"|---|{'---|' * len(FAMILIES)}---|---|"]
        lines += [_row(feature) for feature in features]
        lines.append("")
    lines += [
        "## Several processes",
        "",
        "Two ranks, with gloo on the CPU and with NCCL on two GPUs. The output equals that of the unpatched model on two ranks bit for",
        "bit, and is as near to a float32 run's as that of the model on one device (`no_less_accurate` in `parallel.py`).",
        "",
        "| | Models | Ran on | Remarks |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {', '.join(models)} | {_ran(kind, models, kind != 'ring')} | {parallel.REMARKS.get(kind, '')} |"
        for kind, models in parallel.CASES.items()
    ]
    return "\n".join([*lines, "", *_runs(), *_releases()]) + "\n"


def _recorded() -> dict[str, dict[str, Any]]:
    return json.loads(GPUS.read_text()) if GPUS.exists() else {}


def _ran(row: str, families: Iterable[str], on_cpu: bool) -> str:
    """Where the tests of a row passed."""
    places = ["CPU"] if on_cpu else []
    for gpus, machine in _recorded().items():
        passed = [family for family in families if family in machine["rows"].get(row, ())]
        some = "" if len(passed) == len(list(families)) else f" ({', '.join(passed)})"
        places += [gpus.replace("NVIDIA ", "").replace(" 80GB HBM3", "") + some] if passed else []
    return ", ".join(places) or "not recorded"


def _runs() -> Iterator[str]:
    """When and with what the GPUs' tests ran."""
    for gpus, machine in _recorded().items():
        yield f"{gpus}: {machine['date']}, torch {machine['torch']}, diffusers {machine['diffusers']}."
        yield ""


def _releases() -> Iterator[str]:
    """The results of the newest run of check_diffusers_versions.py: the tests, then fingerprint by
    fingerprint where it was found.
    """
    found = json.loads(RELEASES.read_text())
    yield from (
        "## Releases of diffusers",
        "",
        "`python scripts/check_diffusers_versions.py` patches each model that a release has, from the declared minimum on, and compares it",
        "with the unpatched one (`tests/test_every_model.py`), on a machine without a GPU. Newer releases have more models.",
        "",
        "| diffusers | Tests |",
        "|---|---|",
    )
    yield from (f"| {release} | {result['tests']} |" for release, result in found.items())
    yield from (
        "",
        "What ditnorm replaces, below `diffusers.models`, and the fingerprints of its source. A function with another fingerprint is left",
        "alone, and patching and the report say so.",
        "",
        "| Function | Fingerprint | Releases |",
        "|---|---|---|",
    )
    where: dict[tuple[str, str], list[str]] = {}
    for release, result in found.items():
        for function, fingerprint in result["fingerprints"].items():
            where.setdefault((function, fingerprint), []).append(release)
    for (function, fingerprint), releases in sorted(where.items(), key=lambda item: item[0][0]):
        every = "all" if len(releases) == len(found) else " to ".join(dict.fromkeys((releases[0], releases[-1])))
        yield f"| `{function}` | `{fingerprint}` | {every} |"


def _row(feature: Feature) -> str:
    cells = [_cell(feature, family) for family in FAMILIES]
    ran = _ran(feature.name, feature.families, not feature.gpus)
    return f"| {' | '.join([feature.name, *cells, ran, '; '.join(_remarks(feature))])} |"


def _cell(feature: Feature, family: str) -> str:
    if family not in feature.families:
        return "-"
    failure = feature.upstream.get(family)
    if failure is not None:
        where = {"cpu": " on the CPU", "cuda": " on GPUs", None: ""}[failure.device]
        return f"upstream fails{where}" + (", else same" if failure.device is not None else "")
    if feature.bound is not None:
        return "bound"
    return "partly" if feature.refused is not None else "same"


def _remarks(feature: Feature) -> Iterator[str]:
    if feature.law is not None:
        yield f"fused, {feature.law}"
    yield from dict.fromkeys(f"upstream: {failure.why}" for failure in feature.upstream.values())
    if feature.note:
        yield feature.note
    if feature.stuck is not None:
        yield "unpatching a model that was patched first refuses until the feature is gone"
    if feature.needs:
        yield f"needs {', '.join(feature.needs)}"
    if feature.gpus:
        yield "needs a GPU" if feature.gpus == 1 else f"needs {feature.gpus} GPUs"
    if feature.slow:
        yield "*all*"
    if feature.in_turn:
        yield "*one*"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page is out of date")
    arguments = parser.parse_args()
    if not arguments.check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print(f"{PAGE.relative_to(ROOT)} is out of date: run python tests/compatibility_table.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
