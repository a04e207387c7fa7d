"""Does ditnorm change what FLUX.1 draws? Generates with and without it, from the same seed, and
compares.

    python scripts/parity_flux.py                 a tiny model with random weights
    python scripts/parity_flux.py --model black-forest-labs/FLUX.1-dev
    python scripts/parity_flux.py --model black-forest-labs/FLUX.1-Kontext-dev --image cat.png
    python scripts/parity_flux.py --model lodestones/Chroma1-HD

Prints a table, writes a side-by-side picture and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="FLUX.1",
    tiny="flux",
    pipelines=("FluxPipeline", "FluxKontextPipeline", "ChromaPipeline", "LongCatImagePipeline", "OvisImagePipeline"),
    prompt="A cat holding a sign that says hello world",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
