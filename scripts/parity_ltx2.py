"""Does ditnorm change what LTX-2 draws and says? Generates with and without it, from the same seed,
and compares.

    python scripts/parity_ltx2.py                  a tiny model with random weights
    python scripts/parity_ltx2.py --model Lightricks/LTX-2

Prints a table, writes a side-by-side video and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="LTX-2",
    tiny="ltx2",
    pipelines=("LTX2Pipeline", "LTX2ImageToVideoPipeline"),
    prompt="A capybara sings in the rain, and an owl hoots along",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
