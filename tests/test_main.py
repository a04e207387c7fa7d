"""``python -m ditnorm`` says what there is, never raises, and its status is that of the kernels."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.cases import DEVICE

from ditnorm import kernels
from ditnorm.kernels import compiled
from ditnorm.models.wan import WanTransformerBlock
from ditnorm.patching.coverage import Coverage, coverage
from ditnorm.patching.units import find_units

command = importlib.import_module("ditnorm.__main__")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, str | None]:
    """GPUs as the command finds them, which a test fills: number -> why the kernels don't serve
    it.
    """
    found: dict[int, str | None] = {}
    properties = SimpleNamespace(name="NVIDIA Test", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(command, "_gpu_count", lambda: len(found))
    monkeypatch.setattr(command, "_refusal", found.get)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(command, "coverage", coverage_of_nothing)
    return found


def coverage_of_nothing() -> object:
    raise ImportError("No module named 'diffusers'")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """In one line."""
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_status_is_0_where_the_kernels_serve_a_gpu(gpus: dict[int, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    gpus |= {0: "_C.so does not run on this GPU and driver: too old", 1: None}
    assert command.main([]) == 0
    text = printed(capsys)
    assert "kernels usable on GPU 1 library" in text
    assert "GPU 0 NVIDIA Test, compute capability 9.0, 80 GiB: PyTorch's operations, because _C.so does not run" in text
    assert "GPU 1 NVIDIA Test, compute capability 9.0, 80 GiB: served" in text


@pytest.mark.parametrize(
    ("unavailable", "cuda", "sentence"),
    [
        ("this PyTorch was built without CUDA", None, "without CUDA; where there is an NVIDIA GPU, install a CUDA build of PyTorch."),
        ("ditnorm was installed without compiled kernels (no g++)", "13.0", r"\(no g\+\+\); install it again with DITNORM_CUDA=1 set"),
        ("DITNORM_KERNELS=0", "13.0", "DITNORM_KERNELS=0; unset DITNORM_KERNELS."),
    ],
)
def test_kernels_that_cannot_be_used_have_a_reason_a_remedy_and_status_1(
    unavailable: str,
    cuda: str | None,
    sentence: str,
    gpus: dict[int, str | None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("DITNORM_LIBRARY", raising=False)
    monkeypatch.setattr(kernels, "unavailable", unavailable)
    monkeypatch.setattr(kernels, "FILE", tmp_path / "_C.so")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert command.main([]) == 1
    assert re.search(f"kernels not usable: .*{sentence}", printed(capsys))


def test_an_import_that_fails_is_told_without_a_traceback(gpus: dict[int, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    assert "fused not known: diffusers can't be imported: ImportError: No module named 'diffusers'" in printed(capsys)


def test_the_home_of_the_user_is_not_in_the_text(
    gpus: dict[int, str | None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "unavailable", f"cannot load _C.so: {tmp_path}/venv/_C.so: file too short")
    command.main([])
    assert "cannot load _C.so: ~/venv/_C.so: file too short" in printed(capsys)


def test_a_user_without_a_home_is_told_all(
    gpus: dict[int, str | None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number."""

    def unknown(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert command.main([]) == 1
    assert "diffusers" in printed(capsys)


def test_a_reader_may_stop_reading() -> None:
    with subprocess.Popen([sys.executable, "-m", "ditnorm"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "Broken pipe" not in said


@pytest.mark.skipif(DEVICE == "cuda", reason="where the kernels serve a GPU, the status is 0")
def test_a_library_that_is_none_does_no_harm(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF, but no more")
    environment = os.environ | {"DITNORM_LIBRARY": str(broken)}
    done = subprocess.run([sys.executable, "-m", "ditnorm"], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert done.stderr == ""
    text = re.sub(r"\s+", " ", done.stdout)
    assert re.search(r"kernels not usable: cannot load broken\.so: .*; unset DITNORM_LIBRARY\.", text)
    assert "Qwen-Image QwenImage21Transformer2DModel" in text


def test_a_folder_that_is_no_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.match(r"cannot load \.: ", compiled.problem(Path()) or "")


def test_a_variable_that_names_no_library_is_as_none() -> None:
    code = "from ditnorm import kernels; print(kernels.FILE.name, kernels.unavailable)"
    kept = {key: value for key, value in os.environ.items() if key != "DITNORM_LIBRARY"}
    environments = (kept, kept | {"DITNORM_LIBRARY": ""})
    found = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout for env in environments
    ]
    assert found[0] == found[1]
    assert found[0].startswith("_C.so")


def test_a_library_that_was_copied_in_part_is_not_loaded(tmp_path: Path) -> None:
    """Loading it would end the process."""
    whole, part = tmp_path / "whole.so", tmp_path / "part.so"
    subprocess.run(["g++", "-shared", "-x", "c++", os.devnull, "-o", whole], check=True)
    assert compiled.problem(whole) == "whole.so is of another version of ditnorm: build it again"
    part.write_bytes(whole.read_bytes()[:-1])
    assert str(compiled.problem(part)).endswith("part.so was written or copied only in part")


@pytest.mark.gpu
def test_the_kernels_are_usable_on_this_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    text = printed(capsys)
    assert "kernels usable on GPU 0" in text
    assert re.search(r"library _C\.so, [\d.]+ MB: sm_\d+", text)


# What is fused


@pytest.fixture(scope="module")
def covered() -> Coverage:
    return coverage()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_models_that_patching_fuses_are_covered(name: str, covered: Coverage) -> None:
    model = tiny.load(name, torch.float32)
    family = next(unit.body.family for unit in find_units(model) if unit.is_block)
    assert type(model).__name__ in covered.fused[family]


def test_everything_of_this_diffusers_is_known(covered: Coverage) -> None:
    assert covered.unknown == []
    assert "CogVideoXTransformer3DModel" in covered.others


def test_a_block_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WanTransformerBlock, "fingerprints", {"forward": frozenset({"another"})})
    found = coverage()
    assert "WanTransformer3DModel" not in found.fused.get("Wan", [])
    assert any(
        part.startswith("diffusers.models.transformers.transformer_wan.WanTransformerBlock is not a version") for part in found.unknown
    )


def test_a_part_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = WanTransformerBlock.sites["attn1"]
    monkeypatch.setattr(attention, "processors", {"WanAttnProcessor": {"another": None}})
    found = coverage()
    assert "WanTransformer3DModel" in found.fused["Wan"]
    part = "diffusers.models.transformers.transformer_wan.WanTransformerBlock: its attn1 is not a version that ditnorm knows"
    assert part in found.unknown
