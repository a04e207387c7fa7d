"""Does ditnorm change what Z-Image draws? Generates with and without it, from the same seed, and
compares.

    python scripts/parity_z_image.py              a tiny model with random weights
    python scripts/parity_z_image.py --model Tongyi-MAI/Z-Image-Turbo

Prints a table, writes a side-by-side picture and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="Z-Image",
    tiny="z-image",
    pipelines=("ZImagePipeline",),
    prompt="A red panda reading a newspaper at a small table in the rain",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
