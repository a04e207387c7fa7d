"""Times training steps of real models with random weights: eager, patched with either rounding,
compiled, and patched + compiled.

    python scripts/bench_training.py [--models NAME ...] [--plans NAME ...] [--layers N]
                                     [--quick] [--profile] [--out DIR]

A LoRA of rank 16 on the projections of attention, and all weights; each with and without gradient
checkpointing. Every variant starts from the same weights, in one process. Writes DIR/training.json
and DIR/training.png. The exit status is 1 if something couldn't be measured. Real sizes need a GPU:
60 GB of its memory for all plans.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench.models.catalogue import MODELS
from bench.models.variants import PRECOMPUTED, VARIANTS
from bench.training import report, steps
from bench.training.plans import MODELS as TRAINED
from bench.training.plans import PLANS, WITHOUT_CUDNN
from common.command import as_command
from common.execution import free
from common.tables import environment, environment_line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Time training steps of real models with random weights.")
    plans = {plan.name: plan for plan in PLANS}
    parser.add_argument(
        "--models", nargs="+", choices=list(TRAINED), default=list(TRAINED), metavar="NAME", help=f"of {', '.join(TRAINED)}"
    )
    parser.add_argument("--plans", nargs="+", choices=list(plans), default=list(plans), metavar="NAME", help=f"of {'; '.join(plans)}")
    parser.add_argument("--layers", type=int, metavar="N", help="so many blocks of each kind (default: the table says how many)")
    parser.add_argument("--quick", action="store_true", help="eager and patched only")
    parser.add_argument("--profile", action="store_true", help="list the dearest kernels outside matmul and attention")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    if options.layers is not None and options.layers < 1:
        parser.error("--layers: at least 1")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    variants = [variant for variant in VARIANTS if variant is not PRECOMPUTED and (variant.quick or not options.quick)]
    options.out.mkdir(parents=True, exist_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    command = as_command("scripts/bench_training.py", sys.argv[1:] if argv is None else argv)
    document = {"command": command, "date": date.today().isoformat(), "environment": environment(device), "models": entries}
    for name in options.models:
        real = MODELS[name]
        layers = {kind: n if options.layers is None else min(options.layers, n) for kind, n in TRAINED[name].items()}
        cudnn = name not in WITHOUT_CUDNN
        title = real.title if cudnn else f"{real.title}, without cuDNN's attention"
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        entry = entries[name] = {"title": title, "tokens": real.tokens, "layers": layers, "plans": {}, "errors": {}}
        for plan in (plans[name] for name in options.plans):
            start = time.perf_counter()
            try:
                entry["plans"][plan.name] = steps.measure(real, layers, plan, device, variants)
            except Exception as error:  # the others are still worth measuring
                traceback.print_exc()
                entry["errors"][plan.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            free()
            # A run cut short keeps what it has.
            (options.out / "training.json").write_text(json.dumps(document, indent=1) + "\n")
            print(f"{title}, {plan.name}: {time.perf_counter() - start:.0f} s", flush=True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    print(f"\n{environment_line(device)}\n\n{report.table(entries)}\n\n{report.NOTES}")
    if options.profile:
        print("\n" + "\n\n".join(report.profiles(entries)))
    if any(entry["plans"] for entry in entries.values()):
        report.chart(entries.values(), options.out / "training.png", environment_line(device))
    print(f"\nwritten to {options.out}")
    return int(any(entry["errors"] for entry in entries.values()))


if __name__ == "__main__":
    sys.exit(main())
