"""Does ditnorm change what Wan draws? Generates with and without it, from the same seed, and
compares.

    python scripts/parity_wan.py                  the tiny model of this repository
    python scripts/parity_wan.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480 --frames 33

Prints a table, writes a side-by-side video and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="Wan",
    tiny="wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    prompt="A cat walks on the grass, realistic style",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
