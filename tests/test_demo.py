"""The demo runs, shows what it should, and fails where a difference is."""

import dataclasses
import functools
import re
import warnings

import demo
import torch
from PIL import Image
from pipelines import pictures
from support.cases import DEVICE

import ditnorm
from ditnorm import kernels

PIPELINES = ["QwenImagePipeline", "WanPipeline", "HunyuanVideoPipeline"]


def rows(output):
    """Blocks fused, blocks, ops before, ops after, largest difference, digits read before and after
    of each pipeline in the table.
    """
    pattern = r"^(\w+Pipeline) +(\d+) of (\d+) +(\d+) -> (\d+) +(\S+) +(\d+) of 10 -> (\d+) of 10(?: +[\d.]+ -> [\d.]+)?$"
    return {name: tuple(map(float, numbers)) for name, *numbers in re.findall(pattern, output, re.MULTILINE)}


def panels(image, top, width, height):
    """The three panels of a row of the sheet."""
    return [image.crop((x, top, x + width, top + height)) for x in (pictures.MARGIN + i * (width + pictures.MARGIN) for i in range(3))]


def test_demo_fuses_every_block_and_changes_nothing(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch_dtype", category=FutureWarning)  # the old name of an argument of ours
        status = demo.main(["--steps", "4", "--out", str(tmp_path / "new")])
    output = capsys.readouterr().out
    table = rows(output)
    assert list(table) == PIPELINES
    for fused, blocks, ops_before, ops_after, difference, read_before, read_after in table.values():
        assert fused == blocks > 0
        assert ops_after < ops_before
        assert difference == 0
        assert read_before == read_after
    assert status == 0
    assert output.count("bit-identical: verified") == len(PIPELINES), "not the reports of all"
    assert ("No seconds: " in output) == (not kernels.serves(torch.empty(0, device=DEVICE)))
    still, moving = tmp_path / "new" / "demo.png", tmp_path / "new" / "demo.gif"
    assert str(still) in output
    assert str(moving) in output

    width, height = demo.COLUMNS * (96 + pictures.GAP) - pictures.GAP, 2 * 64 + pictures.GAP  # of the videos, the widest panels
    with Image.open(still) as image:
        pixels = image.convert("L")
    top = pixels.height - pictures.MARGIN - height
    before, after, difference = panels(pixels, top, width, height)
    assert before.tobytes() == after.tobytes()
    assert before.getextrema()[1] - before.getextrema()[0] > 128, "the picture shows nothing"
    assert difference.crop((0, 0, 96, 64)).getextrema() == (0, 0)
    with Image.open(moving) as image:
        assert image.n_frames == 13
        first = image.convert("L")
        image.seek(12)
        assert first.tobytes() != image.convert("L").tobytes(), "nothing moves"


def test_demo_times_both_in_turn_where_the_kernels_run(tmp_path, capsys, monkeypatch):
    """Medians, of generations that are warm: the first of all isn't among them."""
    seconds = iter([9.0, 9.0, *(second for i in range(demo.ROUNDS) for second in (1.0 + i, 0.5 + i))])
    generate = demo.generate

    def timed(pipe, *args, **kwargs):
        made = dataclasses.replace(generate(pipe, *args, **kwargs), seconds=next(seconds))
        patched.append("fused 3 of 3" in re.sub(r"\s+", " ", str(ditnorm.report(pipe))))
        return made

    patched = []
    monkeypatch.setattr(demo, "generate", timed)
    monkeypatch.setattr(demo.kernels, "serves", lambda x: True)
    monkeypatch.setattr(demo, "FAMILIES", {"qwen-image": demo.FAMILIES["qwen-image"]})
    assert demo.main(["--steps", "1", "--out", str(tmp_path)]) == 0
    assert patched == [False, True] * (1 + demo.ROUNDS)
    assert re.search(r"^QwenImagePipeline .* 3\.00 -> 2\.50$", capsys.readouterr().out, re.MULTILINE)


def test_demo_fails_where_something_differs(tmp_path, capsys, monkeypatch):
    """With the single rounding pictures aren't the same: the comparison must see it."""
    monkeypatch.setattr(ditnorm, "patch_pipeline", functools.partial(ditnorm.patch_pipeline, rounding="single"))
    monkeypatch.setattr(demo, "FAMILIES", {"qwen-image": demo.FAMILIES["qwen-image"]})
    assert demo.main(["--steps", "2", "--out", str(tmp_path)]) == 1
    *_, difference, _, _ = rows(capsys.readouterr().out)["QwenImagePipeline"]
    assert difference > 0
