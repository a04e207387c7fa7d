"""Does ditnorm change what Lumina-Image 2.0 draws? Generates with and without it, from the same
seed, and compares.

    python scripts/parity_lumina2.py              a tiny model with random weights
    python scripts/parity_lumina2.py --model Alpha-VLLM/Lumina-Image-2.0

Prints a table, writes a side-by-side picture and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="Lumina-Image 2.0",
    tiny="lumina2",
    pipelines=("Lumina2Pipeline",),
    prompt="A red panda reading a newspaper at a small table in the rain",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
