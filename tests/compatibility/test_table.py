"""docs/compatibility.md is what the data of the tests generates."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import compatibility_table
import diffusers
import diffusers.hooks
import fingerprints
import pytest
import torch

from . import matrix
from .conftest import Recorder

_RECORD = json.loads((Path(__file__).parents[2] / "docs" / "diffusers.json").read_text())


def test_the_committed_page_is_up_to_date() -> None:
    script = Path(__file__).parents[1] / "compatibility_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_passed_on_gpus_is_recorded_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with an order that failed isn't; one that was skipped stays as it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(compatibility_table, "GPUS", tmp_path / "record.json")
    row, families = "`pickle`", ("Qwen-Image", "Wan", "SD3")

    def run(**outcomes: str) -> None:
        recorder = Recorder(tmp_path / "record.json")
        for name, outcome in outcomes.items():
            family, _, order = name.replace("_", " ").partition(" ")
            node = f"tests/x.py::test[pickle-{family.replace('Qwen', 'Qwen-Image')}-{order}]"
            recorder.pytest_runtest_logreport(SimpleNamespace(when="call", passed=outcome == "passed", outcome=outcome, nodeid=node))  # type: ignore[arg-type]
        recorder.pytest_sessionfinish()

    run(Qwen_patch_before="passed", Wan_patch_before="passed", Wan_patch_after="failed")
    assert compatibility_table._ran(row, families, on_cpu=True) == "CPU, 2 x H100 (Qwen-Image)"
    run(Wan_patch_before="passed", SD3_patch_before="passed", Qwen_patch_before="skipped")
    assert compatibility_table._ran(row, families, on_cpu=False) == "2 x H100"
    assert compatibility_table._ran("another row", families, on_cpu=False) == "not recorded"
    recorder = Recorder(tmp_path / "record.json")
    recorder.pytest_runtest_logreport(SimpleNamespace(when="call", passed=True, outcome="passed", nodeid="x.py::test[FSDP2-nccl]"))  # type: ignore[arg-type]
    assert ("FSDP2", "Wan") in recorder.outcomes


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
