"""Does ditnorm change what FLUX.2 draws? Generates with and without it, from the same seed, and
compares.

    python scripts/parity_flux2.py                a tiny Klein with random weights
    python scripts/parity_flux2.py --model black-forest-labs/FLUX.2-klein-4B --steps 4
    python scripts/parity_flux2.py --model black-forest-labs/FLUX.2-dev     with --image it edits

Prints a table, writes a side-by-side picture and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="FLUX.2",
    tiny="flux2",
    pipelines=("Flux2KleinPipeline", "Flux2Pipeline"),
    prompt="A cat holding a sign that says hello world",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
