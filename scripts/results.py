"""Measures everything that README and docs show; results_page.py takes it into their records.

    python scripts/results.py [PART ...] [--out DIR]

`make results` runs both. Each part is one run of a benchmark, in a process of its own, whose output
goes to DIR/PART; without names all run, one after the other, for two hours.
The exit status is 1 if one failed. It needs a GPU that the models fit in: 80 GB.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.models.catalogue import MODELS
from pages.records import OPS

SCRIPTS = Path(__file__).parent

QUICK = ("chroma", "flux.2-dev", "flux.2-klein-4b")
"""Measured eager and patched only; the other models compiled, too, and against float32."""
FLOAT8 = ("qwen-image", "wan2.1-1.3b", "wan2.2-ti2v-5b", "hunyuan-video-480p")
PARTS: dict[str, list[str]] = {
    **{name: ["transformers", "--models", name, "--quick" if name in QUICK else "--accuracy"] for name in MODELS},
    "float8-row": ["transformers", "--models", *FLOAT8, "--quantization", "float8-row", "--quick"],
    "other-quantisations": ["transformers", "--models", "qwen-image", "--quantization", "float8-tensor", "int8-row", "--quick"],
    **{benchmark: [benchmark] for benchmark in ("modulation", "training", *OPS)},
}
"""A name -> the benchmark and its options. Each model is one, so that each can be measured anew."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), metavar="DIR", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    failed = []
    for part in options.parts or PARTS:
        benchmark, *arguments = PARTS[part]
        start = time.perf_counter()
        print(f"== {part}", flush=True)
        command = [sys.executable, str(SCRIPTS / f"bench_{benchmark}.py"), *arguments, "--out", str(options.out / part)]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(part)
        print(f"== {part}: {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
