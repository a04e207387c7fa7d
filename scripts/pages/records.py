"""The records of docs/: what the benchmarks wrote, merged.

A record of models is a list of runs, each with its command, date and environment. A run that is
taken in replaces what older runs measured of the same models on the same device. A record of ops is
one whole run; what a later one measured of some cells, with the same versions on the same device,
replaces these.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
OPS = ("ops", "qk", "sandwich", "activation", "gradients", "quantize")
Run = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One model in one run."""

    key: str
    entry: Mapping[str, Any]
    run: Run

    @property
    def device(self) -> str:
        return str(self.run["environment"]["device"])

    @property
    def card(self) -> str:
        """The device as people call it."""
        return card(self.device)


def runs(docs: Path, name: str) -> list[Run]:
    """Those of a record of models, the oldest first."""
    path = docs / f"{name}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def measured(docs: Path, name: str) -> list[Measured]:
    """Every model of a record, on every device."""
    return [Measured(key, entry, run) for run in runs(docs, name) for key, entry in run["models"].items()]


def newest(found: list[Measured]) -> list[Measured]:
    """Of each model that was measured last."""
    by_key = {m.key: m for m in sorted(found, key=lambda m: m.run["date"])}
    return [m for m in found if by_key[m.key] is m]


def by_device(found: list[Measured]) -> dict[str, list[Measured]]:
    devices: dict[str, list[Measured]] = {}
    for m in found:
        devices.setdefault(m.device, []).append(m)
    return devices


def where(run: Mapping[str, Any]) -> str:
    """Date, device and versions of a run, for the line above a table."""
    environment = run["environment"]
    named = [f"{name} {environment[name]}" for name in ("ditnorm", "torch", "diffusers", "torchao") if name in environment]
    return f"{run['date'][:10]}, {environment['device']}, {', '.join(named)}"


def span(used: list[Run]) -> str:
    """:func:`where` of several runs at once, for README's tables."""
    dates = sorted({run["date"][:10] for run in used})
    found = [dict.fromkeys(run["environment"][name] for run in used) for name in ("device", "torch", "diffusers")]
    devices, torches, diffusers = (" and ".join(values) for values in found)
    return f"{' to '.join(dict.fromkeys([dates[0], dates[-1]]))} on {devices}, torch {torches}, diffusers {diffusers}"


def card(device: str) -> str:
    """The short name of a device: H100 for NVIDIA H100 80GB HBM3."""
    return re.sub(r"\W.*", "", device.removeprefix("NVIDIA "))


def commands(used: list[Run]) -> str:
    """The commands of runs as a block of shell; runs that differ in their models only are one
    line.
    """
    models: dict[tuple[str, str], dict[str, None]] = {}
    for command in (line for run in used for line in run["command"].split("\n")):
        before, option, after = command.partition("--models ")
        names, separator, rest = after.partition(" --")
        models.setdefault((before + option, separator + rest), {}).update(dict.fromkeys(names.split()))
    lines = [before + " ".join(names) + rest for (before, rest), names in models.items()]
    return "```sh\n" + "\n".join(lines) + "\n```"


def runs_of(found: list[Measured]) -> list[Run]:
    """Each run once, in order."""
    return list({id(m.run): m.run for m in found}.values())


def take(path: Path, docs: Path) -> list[str]:
    """Takes the JSON of a benchmark into its record; returns what it says about that, line by
    line.
    """
    document = json.loads(path.read_text())
    script = _script(document)
    if script in OPS:
        return [_take_ops(path, docs, script, document)]
    if script not in ("transformers", "modulation", "training"):
        return [f"{path}: not a record of these pages"]
    said = []
    for name, run in _split(script, document):
        good, bad = _without_errors(run)
        said += [f"{path}: {what}: left out: {error}" for what, error in bad]
        if good["models"]:
            _merge(docs, name, good)
            said.append(f"{path}: docs/{name}.json: {', '.join(good['models'])}")
    return said


def _take_ops(path: Path, docs: Path, script: str, document: Run) -> str:
    record = docs / f"{script}.json"
    old = json.loads(record.read_text()) if record.exists() else {"cells": []}
    cells, before = len(document["cells"]), len(old["cells"])
    if 0 < cells >= before:
        shutil.copyfile(path, record)
        return f"{path}: docs/{record.name}"
    again = {cell["name"]: cell for cell in document["cells"]}
    if not cells or not _joins(old, document, again):
        return f"{path}: left out: it has {cells} cells, where docs/{record.name} has {before}"
    old["cells"] = list(({cell["name"]: cell for cell in old["cells"]} | again).values())
    command = document["environment"]["command"]
    old["environment"]["again"] = [*(c for c in old["environment"].get("again", []) if c != command), command]
    record.write_text(json.dumps(old, indent=1) + "\n")
    return f"{path}: {cells} cells of docs/{record.name}"


def _joins(old: Run, new: Run, again: Mapping[str, Any]) -> bool:
    """Whether cells of a later run may stand in a record: nothing that was measured is lost, and
    nothing that was judged together comes apart.
    """
    versions = ("gpu", "driver", "torch", "cuda", "peers")
    if old.get("bars") or any(old["environment"].get(name) != new["environment"].get(name) for name in versions):
        return False
    before = {cell["name"]: cell.get("contestants", {}).keys() for cell in old["cells"]}
    return all(before.get(name, set()) <= cell.get("contestants", {}).keys() for name, cell in again.items())


def _script(document: Mapping[str, Any]) -> str | None:
    command = document.get("command") or document.get("environment", {}).get("command", "")
    found = re.search(r"bench_(\w+)\.py", command)
    return found and found[1]


def _split(script: str, document: Run) -> Iterator[tuple[str, Run]]:
    """Models with quantised weights have a record of their own."""
    models = document["models"]
    quantised = {key: entry for key, entry in models.items() if "quantization" in entry}
    for name, chosen in ((script, {k: e for k, e in models.items() if k not in quantised}), ("quantised", quantised)):
        if chosen:
            yield name, {**document, "models": chosen}


def _without_errors(run: Run) -> tuple[Run, list[tuple[str, str]]]:
    bad = [(key, entry["error"]) for key, entry in run["models"].items() if "error" in entry]
    bad += [(f"{key}, {plan}", e) for key, entry in run["models"].items() for plan, e in entry.get("errors", {}).items()]
    good = {key: entry for key, entry in run["models"].items() if "error" not in entry and entry.get("plans", True)}
    return {**run, "models": good}, bad


def _merge(docs: Path, name: str, new: Run) -> None:
    kept = []
    for old in runs(docs, name):
        if old["environment"]["device"] == new["environment"]["device"]:
            old = {**old, "models": {k: e for k, entry in old["models"].items() if (e := _rest(entry, new["models"].get(k))) is not None}}
        if old["models"]:
            kept.append(old)
    (docs / f"{name}.json").write_text(json.dumps({"runs": [*kept, new]}, indent=1) + "\n")


def _rest(old: Mapping[str, Any], new: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What ``new`` didn't measure anew: of a model that was trained, the other plans."""
    if new is None:
        return old
    plans = {plan: columns for plan, columns in old.get("plans", {}).items() if plan not in new["plans"]}
    return {**old, "plans": plans} if plans else None
