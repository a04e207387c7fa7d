r"""Times a whole pipeline, stage by stage, without and with ditnorm.

    python scripts/bench_pipeline.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --size 832x480 --frames 81

``--model`` is any checkpoint in diffusers' format that ditnorm supports; the default is the tiny
Qwen-Image of this repository, whose prompt embeddings come ready. ``--compile`` compiles the
repeated blocks in both columns, ``--cache`` turns on FirstBlockCache in both. Each column is warmed
up, then run ``--runs`` times; the median counts. Writes DIR/pipeline.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from typing import Any

import torch
from common.command import as_command
from common.execution import compile_blocks, forget_compiled, synchronize
from common.tables import environment, environment_line, text_table
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from digits.families import FAMILIES
from pipelines.generation import denoisers, generate, wrapped
from pipelines.options import add_options, arguments, loaded, usage_errors
from tqdm import tqdm  # type: ignore[import-untyped]

import ditnorm

STAGES = ("text encoding", "denoising", "decoding", "other", "total")
# FirstBlockCache: the relative change of the first block's residual below which the other blocks
# are skipped.
CACHE_THRESHOLD = 0.1
PROMPT = "A cat walks on the grass, realistic style"


def run(pipe: DiffusionPipeline, arguments: Mapping[str, Any], steps: int, on_step: Callable[[], object]) -> dict[str, float]:
    """One generation; milliseconds of each stage. Denoising: from the first call of a transformer
    to the VAE.
    """
    spent = dict.fromkeys(STAGES, 0.0)
    began: list[float] = []

    def now() -> float:
        synchronize()
        return time.perf_counter()

    def timed(stage: str) -> Callable[..., Any]:
        def around(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            start = now()
            if stage == "decoding" and began:
                # Measured up to the first decoding only, without a wait in between the steps.
                spent["denoising"] = start - began.pop()
            result = method(*args, **kwargs)
            spent[stage] += now() - start
            return result

        return around

    def first_call(_module: object, _args: object) -> None:
        if not began and spent["denoising"] == 0:
            began.append(now())

    with ExitStack() as stack:
        stack.enter_context(wrapped(pipe, "encode_prompt", timed("text encoding")))
        stack.enter_context(wrapped(pipe.vae, "decode", timed("decoding")))
        for model in denoisers(pipe):
            stack.enter_context(model.register_forward_pre_hook(first_call))
        spent["total"] = generate(pipe, arguments, steps, on_step=on_step).seconds
    spent["other"] = spent["total"] - sum(spent[stage] for stage in STAGES[:3])
    return {stage: 1000 * seconds for stage, seconds in spent.items()}


def column(
    pipe: DiffusionPipeline, arguments: Mapping[str, Any], options: argparse.Namespace, on_step: Callable[[], object]
) -> dict[str, float]:
    """The median of each stage over the runs, after a warm-up."""
    if options.compile:
        for model in denoisers(pipe):
            compile_blocks(model)
    runs = [run(pipe, arguments, options.steps, on_step) for _ in range(1 + options.runs)][1:]
    if options.compile:
        for model in denoisers(pipe):
            forget_compiled(model)
    return {stage: statistics.median(times[stage] for times in runs) for stage in STAGES}


def table(baseline: Mapping[str, float], patched: Mapping[str, float]) -> str:
    """The stages as text."""
    rows = [["stage", "baseline ms", "patched ms", "difference ms", "difference"]]
    for stage in STAGES:
        before, after = baseline[stage], patched[stage]
        share = f"{after / before - 1:+.1%}" if before >= 0.05 else ""
        rows.append([stage, f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}", share])
    return text_table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Time a whole pipeline, stage by stage, without and with ditnorm.")
    add_options(parser, tiny=FAMILIES["qwen-image"].folder, pipelines="of a family that ditnorm supports", out="bench-output")
    parser.add_argument("--runs", type=int, default=3, help="measured generations a column (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks in both columns")
    parser.add_argument("--cache", action="store_true", help="FirstBlockCache in both columns")
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with usage_errors(parser):
        pipe = loaded(options, device)
        given = arguments(options, pipe, PROMPT)
        if options.cache:
            for model in denoisers(pipe):
                model.enable_cache(FirstBlockCacheConfig(threshold=CACHE_THRESHOLD))
        with tqdm(total=2 * (1 + options.runs) * options.steps, unit="step") as progress:
            progress.set_description("baseline")
            baseline = column(pipe, given, options, progress.update)
            ditnorm.patch_pipeline(pipe, strict=True)
            if options.precompute_modulation:
                ditnorm.precompute_modulation(pipe)
            progress.set_description("patched")
            patched = column(pipe, given, options, progress.update)

    report = {
        "command": as_command("scripts/bench_pipeline.py", sys.argv[1:] if argv is None else argv),
        "date": date.today().isoformat(),
        "environment": environment(device),
        "pipeline": type(pipe).__name__,
        "model": options.model,
        "milliseconds": {"baseline": baseline, "patched": patched},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "pipeline.json").write_text(json.dumps(report, indent=1) + "\n")
    both = "".join([", compiled" * options.compile, ", FirstBlockCache" * options.cache])
    print(
        f"\n{type(pipe).__name__}, {options.model}, {options.steps} steps{both}\n{environment_line(device)}\n\n{table(baseline, patched)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
