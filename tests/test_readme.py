"""What README tells a newcomer to run, runs."""

import re

import results_page

README = (results_page.ROOT / "README.md").read_text()


def test_the_example_of_use_prints_equal_frames_and_a_report(monkeypatch, capsys):
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from_pretrained" in block)
    monkeypatch.chdir(results_page.ROOT)
    exec(compile(example, "README.md", "exec"), {})
    output = capsys.readouterr().out
    assert output.startswith("True\nditnorm: WanPipeline\n")
    assert re.search(r"fused +6 of 6 blocks", output)
    assert "bit-identical: verified on" in output
