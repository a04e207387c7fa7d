r"""Does ditnorm change what Qwen-Image draws? Generates with and without it, from the same seed,
and compares.

    python scripts/parity_qwen_image.py           the tiny model of this repository
    python scripts/parity_qwen_image.py --model Qwen/Qwen-Image
    python scripts/parity_qwen_image.py --model Qwen/Qwen-Image-Edit-2511 \
        --image cat.png --prompt "Give the cat a hat"
    python scripts/parity_qwen_image.py --model Qwen/Qwen-Image-2.1     with --image it edits

Edit and 2.1 read prompts with a processor of transformers that needs torchvision.
Prints a table, writes a side-by-side picture and a JSON. ``--help`` lists the options.
"""

import sys

from pipelines.parity import Subject, main

SUBJECT = Subject(
    title="Qwen-Image",
    tiny="qwen-image",
    pipelines=("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImage21Pipeline"),
    prompt="A coffee shop entrance with a chalkboard sign that reads: Qwen Coffee",
)

if __name__ == "__main__":
    sys.exit(main(SUBJECT))
