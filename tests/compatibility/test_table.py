"""docs/compatibility.md is what the data of the tests generates."""

import subprocess
import sys
from pathlib import Path

import diffusers


def test_the_committed_page_is_up_to_date() -> None:
    script = Path(__file__).parents[2] / "scripts" / "compatibility_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_diffusers_has_no_ip_adapter_for_the_families_as_the_page_says() -> None:
    families = ("QwenImage", "Wan", "HunyuanVideo", "HunyuanImage", "ChronoEdit")
    pipelines = [name for name in dir(diffusers) if name.startswith(families) and name.endswith("Pipeline")]
    assert {"QwenImagePipeline", "WanPipeline", "HunyuanVideoPipeline"} <= set(pipelines)
    assert [name for name in pipelines if hasattr(getattr(diffusers, name), "load_ip_adapter")] == []
