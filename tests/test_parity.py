"""The parity scripts: hold where they should, fail where something differs, and name what can't be
run.
"""

import functools
import importlib
import json
import sys

import pytest
import tokenizers
import torch
from common import execution
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from pipelines import generation, parity, pictures
from support import qwen_image21_checkpoint, tiny
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import ditnorm

SCRIPTS = ["qwen_image", "wan", "hunyuan_video", "sd3", "flux", "flux2", "z_image", "lumina2", "ltx2"]


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    """The graphs are captured, but run without generated code: seconds instead of minutes."""
    compiled = functools.partial(torch.nn.Module.compile, fullgraph=True, backend="eager")

    def compile_blocks(model):
        for module in model.modules():
            if type(module).__name__ in (model._repeated_blocks or model._no_split_modules):
                compiled(module)

    monkeypatch.setattr(parity, "compile_blocks", compile_blocks)


def run(script, folder, *options):
    subject = importlib.import_module(f"parity_{script}").SUBJECT
    status = parity.main(subject, ["--steps", "2", "--prompt", "37", "--out", str(folder), *options])
    return status, json.loads((folder / f"{subject.tiny}.json").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_tiny_models_keep_every_bit(script, tmp_path, capsys):
    status, report = run(script, tmp_path)
    output = capsys.readouterr().out
    assert status == 0
    assert report["parity"] is True
    assert report["notes"] == []
    found = report["comparisons"]
    assert found["patched : unpatched"]["steps_identical"] == 2
    assert found["patched : unpatched"]["psnr"] is None  # infinite
    assert 0 < found["unpatched : float32"]["relative_error_of_latents"][-1] < 0.1
    assert found["unpatched : float32"] == found["patched : float32"]
    assert "yardstick, compiled : unpatched" in found
    assert "parity holds" in output
    (picture,) = [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    assert str(picture) in output


def image_to_video_checkpoint(folder):
    """A folder like that of Wan2.2-TI2V-5B: a text encoder, modulation per token, and a pipeline
    that animates a picture if it gets one.
    """
    words = {"[PAD]": 0, "</s>": 1, "[UNK]": 2, "a": 3, "cat": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(words), d_model=tiny.TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    pipe = WanPipeline(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]"),
        UMT5EncoderModel(config),
        vae,
        FlowMatchEulerDiscreteScheduler(),
        transformer=tiny.load("wan-ti2v", torch.float32),
        expand_timesteps=True,
    )
    pipe.save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_that_animates_a_picture_keeps_every_bit(tmp_path):
    picture = tmp_path / "cat.png"
    Image.radial_gradient("L").convert("RGB").save(picture)
    model = image_to_video_checkpoint(tmp_path / "model")
    status, report = run("wan", tmp_path / "out", "--model", model, "--image", str(picture), "--size", "64x64", "--frames", "5")
    assert status == 0
    assert report["pipeline"] == "WanImageToVideoPipeline"
    assert report["comparisons"]["patched : unpatched"]["steps_identical"] == 2
    assert 0 < report["comparisons"]["unpatched : float32"]["relative_error_of_latents"][-1] < 0.1


@pytest.mark.parametrize("edits", [False, True], ids=["draws", "edits"])
def test_qwen_image21_keeps_every_bit_with_a_picture_and_without(edits, tmp_path):
    picture = tmp_path / "cat.png"
    Image.radial_gradient("L").convert("RGB").save(picture)
    model = qwen_image21_checkpoint.save(tmp_path / "model")
    options = ["--image", str(picture)] if edits else []
    status, report = run("qwen_image", tmp_path / "out", "--model", model, "--prompt", "a cat", "--size", "64x64", *options)
    assert status == 0
    assert report["pipeline"] == "QwenImage21Pipeline"
    assert report["notes"] == []
    assert report["comparisons"]["patched : unpatched"]["steps_identical"] == 2
    assert 0 < report["comparisons"]["unpatched : float32"]["relative_error_of_latents"][-1] < 0.1


def test_side_by_side_shows_equal_pictures_and_a_black_difference(tmp_path):
    run("qwen_image", tmp_path)
    with Image.open(tmp_path / "qwen-image.png") as image:
        pixels = image.convert("L")
    width, height = 2 * 64 + pictures.GAP, 64  # two digits
    top = pictures.MARGIN + pictures.LABEL
    panels = [pixels.crop((x, top, x + width, top + height)) for x in (pictures.MARGIN + i * (width + pictures.MARGIN) for i in range(3))]
    assert panels[0].tobytes() == panels[1].tobytes()
    assert panels[0].getextrema() != panels[2].getextrema()
    assert panels[2].crop((0, 0, 64, 64)).getextrema() == (0, 0)


def test_single_rounding_differs_and_is_measured_against_the_yardstick(tmp_path):
    status, report = run("qwen_image", tmp_path, "--rounding", "single", "--compile")
    found = report["comparisons"]
    assert found["patched : unpatched"]["steps_identical"] == 0
    assert found["patched : unpatched"]["worst_psnr"] >= 40
    assert "patched + compiled : compiled" in found
    assert "PSNR" in report["rule"]
    assert status == int(not report["parity"])


@pytest.mark.slow
def test_yardstick_of_the_real_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "compile_blocks", execution.compile_blocks)
    status, report = run("qwen_image", tmp_path)
    assert status == 0
    assert report["notes"] == []
    assert report["comparisons"]["yardstick, compiled : unpatched"]["worst_psnr"] >= 30


@pytest.mark.parametrize("quantization", ["float8-row", "int8-row"])
def test_a_quantised_model_keeps_every_bit_and_stands_beside_bfloat16(quantization, tmp_path):
    pytest.importorskip("torchao")
    status, report = run("qwen_image", tmp_path, "--quantization", quantization)
    assert status == 0
    assert report["quantization"] == quantization
    comparisons = report["comparisons"]
    assert comparisons["patched : unpatched"]["steps_identical"] == 2
    errors = [comparisons[f"{title} : bfloat16"]["relative_error_of_latents"] for title in ("unpatched", "patched")]
    assert errors[0] == errors[1]
    assert errors[0][-1] > 0


def test_a_difference_is_a_failure(tmp_path, monkeypatch, capsys):
    patch = ditnorm.patch_pipeline
    monkeypatch.setattr(ditnorm, "patch_pipeline", lambda pipe, rounding: patch(pipe, rounding="single"))
    status, report = run("qwen_image", tmp_path)
    assert status == 1
    assert report["parity"] is False
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_without_a_compiler_parity_is_still_decided(tmp_path, monkeypatch):
    def missing(model):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(parity, "compile_blocks", missing)
    status, report = run("qwen_image", tmp_path)
    assert status == 0
    assert report["notes"] == ["torch.compile: RuntimeError: no C++ compiler"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", str(parity.FOLDER / "wan")], "is a WanPipeline; this script takes QwenImagePipeline"),
        (["--model", "no/such/folder/anywhere"], "no pipeline in diffusers' format"),
        (["--prompt", "a cat"], "draws the digits of its prompt"),
        (["--image", "cat.png"], "takes no --image"),
        (["--frames", "5"], "takes no num_frames"),
        (["--size", "large"], "expected WIDTHxHEIGHT"),
        pytest.param(["--offload"], "no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_run_is_named(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("qwen_image", tmp_path, *options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_weights_are_named(tmp_path, capsys):
    index = {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit):
        run("qwen_image", tmp_path / "out", "--model", str(tmp_path))
    assert str(tmp_path) in capsys.readouterr().err


def test_too_little_memory_says_what_helps(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(parity, "generate", full)
    with pytest.raises(SystemExit):
        run("qwen_image", tmp_path)
    assert "--offload" in capsys.readouterr().err


def test_noise_can_be_given_again_to_a_pipeline_that_mixes_a_picture_into_it():
    shape = {"latent_channels": 4, "block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 1}
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_processor"))
    pipe = HunyuanVideoImageToVideoPipeline(
        transformer=tiny.load("hunyuan-video-token-replace", torch.float32),
        vae=AutoencoderKLHunyuanVideo(**shape, mid_block_add_attention=False),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **absent,
    )
    picture = Image.radial_gradient("L").convert("RGB")
    prompt = {"prompt_embeds": torch.randn(1, tiny.TEXT, tiny.TEXT_DIM), "pooled_prompt_embeds": torch.randn(1, 8)}
    arguments = {"image": picture, "height": 64, "width": 64, "num_frames": 5, "prompt_attention_mask": torch.ones(1, tiny.TEXT), **prompt}
    first = generation.generate(pipe, arguments, 2)
    again, other = (generation.generate(pipe, arguments, 2, noise=noise) for noise in (first.noise, tuple(-drawn for drawn in first.noise)))
    assert torch.equal(again.frames, first.frames)
    assert not torch.equal(other.frames, first.frames)


def test_wrapping_a_function_ends_with_the_block():
    scheduler = FlowMatchEulerDiscreteScheduler()
    with generation.wrapped(scheduler, "step", lambda step, x: x + 1):
        assert scheduler.step(1) == 2
    assert "step" not in vars(scheduler)
    pipeline = sys.modules[WanPipeline.__module__]
    randn = pipeline.randn_tensor
    with generation.wrapped(pipeline, "randn_tensor", lambda randn, shape: shape):
        assert pipeline.randn_tensor((1, 2)) == (1, 2)
    assert pipeline.randn_tensor is randn
