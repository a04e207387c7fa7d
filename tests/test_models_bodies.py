"""How fused bodies are found, and what they must share with the classes they stand in for."""

import importlib
import inspect
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from support import tiny
from torch import nn

from ditnorm import models
from ditnorm.fused import adaln
from ditnorm.fused.block import FusedUnit
from ditnorm.fused.module import FusedModule
from ditnorm.models import chroma, flux, flux2, hunyuan_video, ltx2, lumina2, ovis_image, qwen_image, qwen_image21, sd3, wan, z_image
from ditnorm.patching.units import find_units

UPSTREAM = [
    ("transformers.transformer_qwenimage.QwenImageTransformerBlock", qwen_image.QwenImageTransformerBlock),
    ("transformers.transformer_wan.WanTransformerBlock", wan.WanTransformerBlock),
    ("transformers.transformer_wan_animate.WanTransformerBlock", wan.WanTransformerBlock),
    ("transformers.transformer_chronoedit.WanTransformerBlock", wan.WanTransformerBlock),
    ("transformers.transformer_wan_vace.WanVACETransformerBlock", wan.WanVACETransformerBlock),
    ("transformers.transformer_wan.WanTimeTextImageEmbedding", wan.WanTimeTextImageEmbedding),
    ("transformers.transformer_chronoedit.WanTimeTextImageEmbedding", wan.WanTimeTextImageEmbedding),
    ("transformers.transformer_hunyuan_video.HunyuanVideoTransformerBlock", hunyuan_video.HunyuanVideoTransformerBlock),
    ("transformers.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock", hunyuan_video.HunyuanVideoSingleTransformerBlock),
    (
        "transformers.transformer_hunyuan_video.HunyuanVideoTokenReplaceTransformerBlock",
        hunyuan_video.HunyuanVideoTokenReplaceTransformerBlock,
    ),
    (
        "transformers.transformer_hunyuan_video.HunyuanVideoTokenReplaceSingleTransformerBlock",
        hunyuan_video.HunyuanVideoTokenReplaceSingleTransformerBlock,
    ),
    (
        "transformers.transformer_hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZero",
        hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZero,
    ),
    (
        "transformers.transformer_hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle",
        hunyuan_video.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle,
    ),
    ("transformers.transformer_hunyuan_video15.HunyuanVideo15TransformerBlock", hunyuan_video.HunyuanVideoTransformerBlock),
    ("transformers.transformer_hunyuanimage.HunyuanImageTransformerBlock", hunyuan_video.HunyuanImageTransformerBlock),
    ("transformers.transformer_hunyuanimage.HunyuanImageSingleTransformerBlock", hunyuan_video.HunyuanVideoSingleTransformerBlock),
    ("transformers.transformer_qwenimage21.QwenImage21TransformerBlock", qwen_image21.QwenImage21TransformerBlock),
    ("transformers.transformer_qwenimage21.QwenImage21AdaLayerNormContinuous", qwen_image21.QwenImage21AdaLayerNormContinuous),
    ("transformers.transformer_flux.FluxTransformerBlock", flux.FluxTransformerBlock),
    ("transformers.transformer_flux.FluxSingleTransformerBlock", flux.FluxSingleTransformerBlock),
    ("transformers.transformer_longcat_image.LongCatImageTransformerBlock", flux.FluxTransformerBlock),
    ("transformers.transformer_longcat_image.LongCatImageSingleTransformerBlock", flux.FluxSingleTransformerBlock),
    ("transformers.transformer_bria.BriaTransformerBlock", flux.BriaTransformerBlock),
    ("transformers.transformer_bria.BriaSingleTransformerBlock", flux.BriaSingleTransformerBlock),
    ("transformers.transformer_bria_fibo.BriaFiboTransformerBlock", flux.FluxTransformerBlock),
    ("transformers.transformer_bria_fibo.BriaFiboSingleTransformerBlock", flux.BriaFiboSingleTransformerBlock),
    ("transformers.transformer_ovis_image.OvisImageTransformerBlock", flux.FluxTransformerBlock),
    ("transformers.transformer_ovis_image.OvisImageSingleTransformerBlock", ovis_image.OvisImageSingleTransformerBlock),
    ("transformers.transformer_flux2.Flux2TransformerBlock", flux2.Flux2TransformerBlock),
    ("transformers.transformer_flux2.Flux2SingleTransformerBlock", flux2.Flux2SingleTransformerBlock),
    ("transformers.transformer_chroma.ChromaTransformerBlock", chroma.ChromaTransformerBlock),
    ("transformers.transformer_chroma.ChromaSingleTransformerBlock", chroma.ChromaSingleTransformerBlock),
    ("transformers.transformer_chroma.ChromaAdaLayerNormZeroPruned", chroma.ChromaAdaLayerNormZeroPruned),
    ("transformers.transformer_chroma.ChromaAdaLayerNormZeroSinglePruned", chroma.ChromaAdaLayerNormZeroSinglePruned),
    ("transformers.transformer_chroma.ChromaAdaLayerNormContinuousPruned", chroma.ChromaAdaLayerNormContinuousPruned),
    ("attention.JointTransformerBlock", sd3.JointTransformerBlock),
    ("transformers.transformer_sd3.SD3SingleTransformerBlock", sd3.SD3SingleTransformerBlock),
    ("normalization.SD35AdaLayerNormZeroX", sd3.SD35AdaLayerNormZeroX),
    ("transformers.transformer_z_image.ZImageTransformerBlock", z_image.ZImageTransformerBlock),
    ("transformers.transformer_z_image.FinalLayer", z_image.ZImageFinalLayer),
    ("controlnets.controlnet_z_image.ZImageControlTransformerBlock", z_image.ZImageControlTransformerBlock),
    ("transformers.transformer_ltx2.LTX2VideoTransformerBlock", ltx2.LTX2VideoTransformerBlock),
    ("transformers.transformer_ltx2.LTX2VideoTransformerBlock", ltx2.LTX2VideoTransformerBlockOf037),
    ("transformers.transformer_lumina2.Lumina2TransformerBlock", lumina2.Lumina2TransformerBlock),
    ("normalization.LuminaRMSNormZero", lumina2.LuminaRMSNormZero),
    ("normalization.LuminaLayerNormContinuous", lumina2.LuminaLayerNormContinuous),
    ("normalization.AdaLayerNormZero", adaln.AdaLayerNormZero),
    ("normalization.AdaLayerNormZeroSingle", adaln.AdaLayerNormZeroSingle),
    ("normalization.AdaLayerNormContinuous", adaln.AdaLayerNormContinuous),
]


def _upstream(path: str) -> type:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"diffusers.models.{module}"), name)


@pytest.mark.parametrize(("path", "body"), UPSTREAM)
def test_every_supported_class_finds_its_body(path, body):
    # Fails on a diffusers that has changed the class: then compare the forwards and add the
    # fingerprint, or a body.
    if "qwenimage21" in path and not hasattr(diffusers, "QwenImage21Transformer2DModel"):
        pytest.skip("comes with diffusers 0.41.0")
    upstream = _upstream(path)
    if "ltx2" in path and models.body_for(upstream) in {ltx2.LTX2VideoTransformerBlock, ltx2.LTX2VideoTransformerBlockOf037} - {body}:
        pytest.skip("of another diffusers")
    assert models.body_for(upstream) is body
    assert getattr(models.near_miss(upstream), "names", frozenset()) == body.names
    ours = [name for name in inspect.signature(body.forward).parameters if name != "law"]
    assert ours == list(inspect.signature(upstream.forward).parameters)


def test_every_body_is_covered():
    assert {body for _, body in UPSTREAM} == set(models.BODIES)


def test_pickles_name_a_body_by_its_family_whichever_file_of_a_folder_defines_it():
    """So they outlive changes of the files inside."""
    remaining, bodies = [FusedModule], []
    while remaining:
        remaining += (derived := remaining.pop().__subclasses__())
        bodies += [body for body in derived if body.__module__.startswith("ditnorm.models.")]
    assert set(models.BODIES) & set(bodies)
    for body in bodies:
        assert pickle.dumps(body, 0).startswith(f"c{'.'.join(body.__module__.split('.')[:3])}\n{body.__name__}\n".encode())


@pytest.mark.parametrize(
    "path", ["normalization.CogVideoXLayerNormZero", "transformers.transformer_skyreels_v2.SkyReelsV2TransformerBlock"]
)
def test_an_unknown_class_has_no_body(path):
    assert models.body_for(_upstream(path)) is None
    assert models.near_miss(_upstream(path)) is None


def test_a_forward_replaced_later_is_no_longer_matched(monkeypatch):
    upstream = _upstream("transformers.transformer_wan.WanTransformerBlock")
    assert models.body_for(upstream) is wan.WanTransformerBlock

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        return hidden_states

    monkeypatch.setattr(upstream, "forward", forward)
    assert models.body_for(upstream) is None
    assert models.near_miss(upstream) is wan.WanTransformerBlock


@pytest.mark.parametrize("name", tiny.MODELS)
def test_facts_of_a_body_hide_no_attribute_of_its_module(name):
    # nn.Module looks up its children only where the class has no attribute of that name.
    facts = {name for name in dir(FusedUnit) if not name.startswith("__")} | {
        *FusedUnit.__annotations__,
        *FusedModule.__annotations__,
        "origin",
    }
    for module in tiny.load(name, torch.float32).modules():
        if models.body_for(type(module)) is not None:
            assert facts.isdisjoint({*dict(module.named_children()), *dict(module.named_parameters()), *module.__dict__})


def test_a_norm_over_two_dims_is_refused():
    block = tiny.load("qwen-image", torch.float32).transformer_blocks[0]
    assert find_units(block)[0].refusal is None
    block.img_norm2 = nn.LayerNorm((16, 48))
    assert find_units(block)[0].refusal == "img_norm2: it norms over more than the last dim"


def test_a_changed_fp32_layer_norm_is_refused(monkeypatch):
    block = tiny.load("wan-t2v", torch.float32).blocks[0]
    assert find_units(block)[0].refusal is None
    monkeypatch.setattr(type(block.norm1), "forward", lambda self, inputs: inputs)
    assert find_units(block)[0].refusal == "norm1: this version of FP32LayerNorm is unknown"


def test_families_are_named_as_users_know_them():
    assert {"FLUX.1", "FLUX.2", "HunyuanVideo", "Qwen-Image", "Wan"} <= set(models.families())


def test_importing_ditnorm_does_not_import_diffusers():
    """Importing diffusers takes seconds."""
    code = "import sys, ditnorm; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
