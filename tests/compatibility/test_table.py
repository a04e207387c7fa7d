"""docs/compatibility.md is what the data of the tests generates."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import diffusers.hooks
import fingerprints
import pytest

from . import matrix

_RECORD = json.loads((Path(__file__).parents[2] / "docs" / "diffusers.json").read_text())


def test_the_committed_page_is_up_to_date() -> None:
    script = Path(__file__).parents[1] / "compatibility_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_diffusers_has_no_ip_adapter_for_the_other_families_as_the_page_says() -> None:
    families = ("QwenImage", "Wan", "HunyuanVideo", "HunyuanImage", "ChronoEdit")
    pipelines = [name for name in dir(diffusers) if name.startswith(families) and name.endswith("Pipeline")]
    assert {"QwenImagePipeline", "WanPipeline", "HunyuanVideoPipeline"} <= set(pipelines)
    assert [name for name in pipelines if hasattr(getattr(diffusers, name), "load_ip_adapter")] == []


def test_everything_that_diffusers_hooks_configures_has_a_row() -> None:
    names = " ".join(feature.name for features in matrix.GROUPS.values() for feature in features)
    configured = [name for name in dir(diffusers.hooks) if name.endswith("Config")]
    assert {"FirstBlockCacheConfig", "LayerSkipConfig"} <= set(configured)
    assert [name for name in configured if name not in names] == []


@pytest.mark.skipif(diffusers.__version__ not in _RECORD, reason="not a release that the record has")
def test_the_recorded_fingerprints_are_those_of_this_release() -> None:
    assert fingerprints.found() == _RECORD[diffusers.__version__]["fingerprints"]
