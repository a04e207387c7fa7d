"""Does ditnorm change what Stable Diffusion 3.5 draws? Generates with and without it, from the same
seed, and compares.

    python scripts/parity_sd3.py                  a tiny model with random weights
    python scripts/parity_sd3.py --model stabilityai/stable-diffusion-3.5-medium

Prints a table, writes a side-by-side picture and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="Stable Diffusion 3.5",
    tiny="sd3",
    pipelines=("StableDiffusion3Pipeline",),
    prompt="A capybara holding a sign that reads: Hello World",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
