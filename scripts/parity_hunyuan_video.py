r"""Does ditnorm change what HunyuanVideo draws? Generates with and without it, from the same seed,
and compares.

    python scripts/parity_hunyuan_video.py        the tiny model of this repository
    python scripts/parity_hunyuan_video.py --model hunyuanvideo-community/HunyuanVideo \
        --size 512x320 --frames 33

Prints a table, writes a side-by-side video and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="HunyuanVideo",
    tiny="hunyuan-video",
    pipelines=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15ImageToVideoPipeline",
    ),
    prompt="A cat walks on the grass, realistic style",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
