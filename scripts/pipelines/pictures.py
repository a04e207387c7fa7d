"""Labelled panels side by side, still or moving."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import export_to_video
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

AMPLIFICATION = 64
MARGIN, LABEL, GAP = 12, 20, 6  # pixels
FPS = 12

Row = Sequence[tuple[str, Image.Image]]
"""Labelled panels of one height."""


def tiled(pictures: Tensor, columns: int) -> Image.Image:
    """``[N, C, H, W]``, RGB or RGBA, 0 to 1, as one picture, row by row, without alpha."""
    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    canvas = torch.full((3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), 0.25)
    for index, picture in enumerate(pictures):
        y, x = index // columns * (height + GAP), index % columns * (width + GAP)
        canvas[:, y : y + height, x : x + width] = picture[:3]
    return Image.fromarray(canvas.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy())


def comparison_row(title: str, before: Tensor, after: Tensor, columns: int) -> list[tuple[str, Image.Image]]:
    """Unpatched, patched and their amplified difference; pictures ``[N, C, H, W]``, RGB or RGBA, 0
    to 1.
    """
    return [
        (f"{title}, unpatched", tiled(before, columns)),
        ("patched", tiled(after, columns)),
        (
            f"difference x {AMPLIFICATION}" + (" (none)" if torch.equal(before, after) else ""),
            tiled((before - after).abs() * AMPLIFICATION, columns),
        ),
    ]


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of labelled panels on white; the panels of all rows stand in columns."""
    widths = [max(panel.width for _, panel in column) for column in zip(*rows, strict=True)]
    width = MARGIN + sum(w + MARGIN for w in widths)
    height = MARGIN + sum(LABEL + row[0][1].height + MARGIN for row in rows)
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    y = MARGIN
    for row in rows:
        x = MARGIN
        for (label, panel), column in zip(row, widths, strict=True):
            draw.text((x, y), label, fill="black", font=font)
            canvas.paste(panel, (x, y + LABEL))
            x += column + MARGIN
        y += LABEL + row[0][1].height + MARGIN
    return canvas


def save_animation(images: Sequence[Image.Image], path: Path) -> None:
    """A GIF that loops; the last frame stays longer."""
    durations = [1000 // FPS] * (len(images) - 1) + [1000]
    # Dithering makes flat areas flicker, and large.
    few = [image.quantize(64, dither=Image.Dither.NONE) for image in images]
    few[0].save(path, save_all=True, append_images=few[1:], duration=durations, loop=0, optimize=True)


def save_moving(images: Sequence[Image.Image], path: Path) -> Path:
    """An MP4 where ``imageio-ffmpeg`` is installed, else a GIF, which has 256 colours. Returns the
    path with its suffix.
    """
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        path = path.with_suffix(".gif")
        save_animation(images, path)
        return path
    path = path.with_suffix(".mp4")
    # Its default quality blurs what is to be compared, and H.264 wants even sizes.
    even = [image.crop((0, 0, image.width & ~1, image.height & ~1)) for image in images]
    export_to_video(even, str(path), fps=FPS, quality=9, macro_block_size=2)
    return path
