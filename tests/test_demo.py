"""The demo runs, shows what it should, and fails where a difference is."""

import functools
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import ditnorm

SCRIPTS = Path(__file__).parent.parent / "scripts"
PIPELINES = ["QwenImagePipeline", "WanPipeline", "HunyuanVideoPipeline"]


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    import demo

    return demo


def rows(output):
    """Blocks fused, blocks, ops before, ops after and largest difference of each pipeline in the printed table."""
    pattern = r"^(\w+Pipeline) +(\d+) of (\d+) +(\d+) -> (\d+) +(\S+) +[\d.]+ -> [\d.]+$"
    return {name: tuple(map(float, numbers)) for name, *numbers in re.findall(pattern, output, re.MULTILINE)}


def test_demo_fuses_every_block_and_changes_nothing(demo, tmp_path, capsys):
    status = demo.main(["--steps", "2", "--out", str(tmp_path / "new")])
    output = capsys.readouterr().out
    table = rows(output)
    assert list(table) == PIPELINES
    for fused, blocks, ops_before, ops_after, difference in table.values():
        assert fused == blocks > 0
        assert ops_after < ops_before
        assert difference == 0
    assert status == 0
    assert "bit-identical: verified" in output
    picture = tmp_path / "new" / "demo.png"
    assert str(picture) in output
    with Image.open(picture) as image:
        pixels = image.convert("L")
    left, middle, right = (
        pixels.crop((x, demo.MARGIN + demo.LABEL, x + 384, demo.MARGIN + demo.LABEL + 192))
        for x in (demo.MARGIN, 2 * demo.MARGIN + 384, 3 * demo.MARGIN + 2 * 384)
    )
    assert left.tobytes() == middle.tobytes()
    assert left.getextrema()[1] - left.getextrema()[0] > 128, "the picture shows nothing"
    assert right.getextrema() == (0, 0)


def test_demo_fails_where_something_differs(demo, tmp_path, capsys, monkeypatch):
    """With the single rounding pictures aren't the same: the comparison must see it."""
    monkeypatch.setattr(ditnorm, "patch_pipeline", functools.partial(ditnorm.patch_pipeline, rounding="single"))
    monkeypatch.setattr(demo, "PIPELINES", demo.PIPELINES[:1])
    assert demo.main(["--steps", "2", "--out", str(tmp_path)]) == 1
    *_, difference = rows(capsys.readouterr().out)["QwenImagePipeline"]
    assert difference > 0
