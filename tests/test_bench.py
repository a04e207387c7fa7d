"""The benchmarks of whole models and pipelines run, at a small size, and report what they
measured.
"""

import json
import math
import re
import statistics
import tempfile
from dataclasses import replace

import bench_pipeline
import bench_transformers
import diffusers
import pages.models
import pages.quantised
import pytest
import results_page
import torch
from bench.models import accuracy, kernel_shares, real_model, steps, variants
from bench.models.catalogue import MODELS
from bench.models.report import profile_table
from common import execution
from pages import records
from support.real_sizes import shrunk

import ditnorm

SMALL = shrunk(MODELS)
ALL = [variant.name for variant in variants.VARIANTS]
ACCURACY = [variant.name for variant in variants.VARIANTS if variant.accuracy]
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs ``bench_transformers.py`` with shrunk models: status and report."""
    monkeypatch.setattr(bench_transformers, "MODELS", SMALL)
    monkeypatch.setattr(steps, "TIMED_SECONDS", 0)

    def run(*options):
        status = bench_transformers.main(["--out", str(tmp_path), *options])
        return status, json.loads((tmp_path / "transformers.json").read_text())

    return run


def written_of(report, folder):
    """What the pages show of one run of models."""
    (folder / "transformers.json").write_text(json.dumps({"runs": [report]}))
    return pages.models.written(folder)


def test_quick_run_measures_models_and_keeps_their_bits(bench, tmp_path, capsys):
    """One of every kind of inputs."""
    chosen = ["qwen-image", "qwen-image-2.1", "flux.1-dev", "chroma", "flux.2-dev", "wan2.1-1.3b", "wan2.2-ti2v-5b"]
    chosen += ["hunyuan-video-480p", "hunyuan-video-1.5", "sd3.5-medium", "z-image-turbo", "lumina-image-2.0", "ltx-2"]
    status, report = bench("--quick", "--models", *chosen)
    output = capsys.readouterr().out
    assert status == 0, output
    assert list(report["models"]) == chosen
    for name, entry in report["models"].items():
        tables = ("qwen-image", "flux.1-dev", "hunyuan-video-480p", "hunyuan-video-1.5", "sd3.5-medium")
        precomputed = [variants.PRECOMPUTED.name] if name in tables else []
        assert list(entry["columns"]) == ["eager", "patched", *precomputed]
        assert all(entry["columns"][name]["table_s"] > 0 for name in precomputed)
        assert all(entry["columns"][name]["steps_identical"] == steps.COMPARED for name in precomputed)
        assert entry["columns"]["patched"]["steps_identical"] == entry["steps_compared"] == steps.COMPARED
        assert "steps_identical" not in entry["columns"]["eager"]
        assert entry["title"] in output
        for column in entry["columns"].values():
            assert column["steps"] == steps.TIMED_STEPS
            assert 0 < column["other_share"] < 1
    assert (tmp_path / "transformers.png").stat().st_size > 0


def test_blocks_are_compiled_where_diffusers_does_not_say_which_they_are():
    model = SMALL["sd3.5-large"].build({"num_layers": 2}, CPU)
    assert not model._repeated_blocks
    execution.compile_blocks(model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["transformer_blocks.0", "transformer_blocks.1"]
    execution.forget_compiled(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_full_run_has_every_column_and_makes_a_page(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "compile_blocks", lambda model: model.compile_repeated_blocks(fullgraph=True, backend="eager"))
    status, report = bench("--models", "wan2.2-ti2v-5b", "--layers", "1")
    assert status == 0
    (entry,) = report["models"].values()
    assert list(entry["columns"]) == [name for name in ALL if name != variants.PRECOMPUTED.name]
    assert entry["layers"] == {"num_layers": 1}

    docs = tmp_path / "docs"
    docs.mkdir()
    records.take(tmp_path / "transformers.json", docs)
    steps_of_models = pages.models.written(docs)["steps"]
    assert report["command"] in steps_of_models
    assert entry["title"] in steps_of_models
    assert f"{entry['columns']['patched']['step_ms']:,.1f}" in steps_of_models
    results_page.draw(docs)
    assert [picture.name for picture in docs.glob("*.png")] == ["transformers-cpu.png"]


def test_accuracy_is_measured_printed_and_put_on_the_page(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variants, "compile_blocks", lambda model: model.compile_repeated_blocks(fullgraph=True, backend="eager"))
    status, report = bench("--accuracy", "--models", "qwen-image", "hunyuan-video-480p")
    output = capsys.readouterr().out
    assert status == 0, output
    assert report["command"].endswith(" --accuracy")
    assert [entry["accuracy"]["layers"] for entry in report["models"].values()] == [
        {"num_layers": 2},
        {"num_layers": 1, "num_single_layers": 1},
    ]
    page = written_of(report, tmp_path)["accuracy"]
    for entry in report["models"].values():
        found = entry["accuracy"]
        errors = found["errors"]
        assert found["identical"] is True
        assert list(errors) == ACCURACY
        assert errors["patched"] == errors["compiled"] == errors["eager"]  # the compiler's "eager" backend keeps the bits
        assert 0 < errors["patched, single"]["relative"] < errors["eager"]["relative"]
        assert f"{errors['patched, single']['relative']:.3e}" in output
        assert f"{errors['patched, single']['relative']:.3e} ({errors['patched, single']['psnr']:.1f} dB, -" in page


def test_without_accuracy_the_page_has_nothing_of_it(bench, tmp_path):
    _, report = bench("--quick", "--accuracy", "--models", "qwen-image")
    assert list(report["models"]["qwen-image"]["accuracy"]["errors"]) == ["eager", "patched", "patched, single"]
    assert written_of(report, tmp_path)["accuracy"]
    del report["models"]["qwen-image"]["accuracy"]
    assert not written_of(report, tmp_path)["accuracy"]


@pytest.mark.parametrize("name", ["wan2.2-ti2v-5b", "qwen-image-2.1", "hunyuan-video-1.5"])
def test_the_float32_run_is_upstream_with_the_weights_and_inputs_of_bf16(name, monkeypatch):
    real = SMALL[name]
    layers = real.layers(None)
    weights = real.build(layers, CPU).state_dict()
    inputs = {k: v for k, v in real.arguments(real, real.noise(CPU), torch.tensor(1000.0)).items() if isinstance(v, torch.Tensor)}
    runs = []

    def forward(model, *args, **kwargs):
        def keep(module, args, arguments):
            fused = any(type(part).__module__.startswith("ditnorm") for part in module.modules())
            tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
            runs.append((fused, tf32, {k: t.clone() for k, t in module.state_dict().items()}, arguments))

        with model.register_forward_pre_hook(keep, with_kwargs=True):
            return measured(model, *args, **kwargs)

    measured = accuracy.forward
    monkeypatch.setattr(accuracy, "forward", forward)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    accuracy.measure(real, layers, CPU, [variants.EAGER, variants.PATCHED, variants.SINGLE])
    assert torch.backends.cudnn.allow_tf32

    assert [fused for fused, *_ in runs] == [False, True, True, False]
    for _, tf32, state, arguments in runs[:-1]:
        assert tf32
        assert all(same(state[key], value) for key, value in weights.items())
        assert all(same(arguments[key], value) for key, value in inputs.items())
    _, tf32, state, arguments = runs[-1]
    assert not tf32
    assert all(same(state[key], value.float()) for key, value in weights.items())
    assert all(same(arguments[key], value.float() if value.is_floating_point() else value) for key, value in inputs.items())


def same(a, b):
    """One dtype and the same values."""
    return a.dtype == b.dtype and torch.equal(a, b)


def test_error_against_float32():
    exact = torch.tensor([3.0, -4.0])
    eager, output = (torch.tensor([3.0, value], dtype=torch.bfloat16) for value in (-5.0, -3.5))
    found = accuracy.error(output, eager, exact)
    assert found.relative == pytest.approx(0.5 / 5)
    assert found.psnr == pytest.approx(20 * math.log10(4 / (0.5 / math.sqrt(2))))
    assert found.chance == pytest.approx((1 - 0.25) / 2)


def test_chance_is_how_much_equally_accurate_ways_differ():
    exact = torch.zeros(1000)
    ratios, chances = [], []
    for _ in range(100):
        output, eager = torch.randn(2, 1000)
        found = accuracy.error(output, eager, exact)
        ratios.append((output.norm() / eager.norm()).item())
        chances.append(found.chance)
    # Of 100 samples a standard deviation is known to 1 / sqrt(200), 7 %; five times that.
    assert statistics.stdev(ratios) == pytest.approx(statistics.mean(chances), rel=0.35)


@pytest.mark.parametrize(
    ("identical", "single", "chance", "holds"),
    [
        (True, 0.9, 0.0, True),
        (True, 1.0, 0.0, True),
        (True, 1.02, 0.01, True),
        (True, 1.04, 0.01, False),
        (False, 0.9, 0.0, False),
        (True, math.nan, 0.0, False),
    ],
)
def test_single_rounding_further_from_float32_than_eager_is_a_failure(bench, monkeypatch, identical, single, chance, holds):
    errors = {name: {"relative": single if name == "patched, single" else 1.0, "psnr": 40.0, "chance": chance} for name in ACCURACY}
    found = {"layers": {"num_layers": 2}, "identical": identical, "errors": errors}
    monkeypatch.setattr(accuracy, "measure", lambda *args, **kwargs: found)
    status, _ = bench("--quick", "--accuracy", "--models", "qwen-image")
    assert status == int(not holds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video-480p"])
def test_columns_of_the_real_compiler(bench, name):
    status, report = bench("--models", name, "--layers", "1")
    assert status == 0
    assert list(report["models"][name]["columns"]) == ALL


def test_a_model_that_fails_leaves_the_others_measured(bench, capsys, monkeypatch):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines.")

    monkeypatch.setitem(SMALL, "qwen-image", replace(SMALL["qwen-image"], arguments=too_large))
    status, report = bench("--quick", "--models", "qwen-image", "wan2.1-1.3b")
    assert status == 1
    failed, measured = report["models"].values()
    assert failed["error"].startswith("out of GPU memory (CUDA out of memory. Tried to allocate 20.00 GiB.)")
    assert "error" not in measured
    assert failed["error"] in capsys.readouterr().out


def test_different_bits_are_a_failure(bench, monkeypatch, capsys):
    patch = ditnorm.patch_model
    monkeypatch.setattr(ditnorm, "patch_model", lambda model, strict, rounding: patch(model, rounding="single"))
    status, report = bench("--quick", "--models", "qwen-image")
    (entry,) = report["models"].values()
    assert status == 1
    assert entry["columns"]["patched"]["steps_identical"] < entry["steps_compared"]
    assert entry["eager_reproducible"] is True
    assert "of 3 steps equal" in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALL)
def test_random_models_have_the_dtypes_of_loaded_ones(name):
    real = SMALL[name]
    model = real.build(real.layers(None), CPU)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = getattr(diffusers, real.cls).from_pretrained(folder, torch_dtype=real_model.DTYPE)
    assert {name: t.dtype for name, t in model.state_dict().items()} == {name: t.dtype for name, t in loaded.state_dict().items()}
    assert {name: t.dtype for name, t in model.named_buffers()} == {name: t.dtype for name, t in loaded.named_buffers()}


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [
        ("qwen-image", 4096, 3072),
        ("qwen-image-2.1", 4096, 4096),
        ("wan2.1-1.3b", 32760, 1536),
        ("wan2.2-ti2v-5b", 27280, 3072),
        ("wan2.2-a14b", 75600, 5120),
        ("hunyuan-video-480p", 27030, 3072),
        ("hunyuan-video-720p", 118800, 3072),
        ("hunyuan-video-1.5", 49290, 2048),
        ("flux.1-dev", 4096, 3072),
        ("chroma", 4096, 3072),
        ("flux.2-dev", 4096, 6144),
        ("flux.2-klein-4b", 4096, 3072),
        ("flux.2-klein-9b", 4096, 4096),
        ("z-image-turbo", 4096, 3840),
        ("lumina-image-2.0", 4096, 2304),
    ],
)
def test_published_sizes(name, tokens, width):
    real = MODELS[name]
    with torch.device("meta"):
        model = getattr(diffusers, real.cls)(**{**real.config, **real.layers(1)})
    assert real.tokens == tokens
    heads, head_dim = real.config.get("num_attention_heads"), real.config.get("attention_head_dim")
    own = model.dim if hasattr(model, "dim") else model.config.get("hidden_size")
    assert (own if heads is None else heads * head_dim) == width
    assert real.layers(None).keys() == real.layers(1).keys() <= real.config.keys()
    assert next(model.parameters()).is_meta


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matmul"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matmul"),
        ("triton_tem_fused_addmm_3", "matmul"),
        ("aten::addmm", "matmul"),
        ("aten::mm", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("void at::native::elementwise_kernel<128, 4, add>", "other"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "other"),
        ("triton_poi_fused_mul_add_native_layer_norm_0", "other"),
        ("ditnorm::row_kernel<bf16>", "other"),
        ("aten::native_layer_norm", "other"),
        ("aten::add", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, kind):
    assert kernel_shares.kind(kernel) == kind


ADD = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >"
    "(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)"
)
MUL = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<float, float, float, "
    "at::native::binary_internal::MulFunctor<float> > >(at::TensorIteratorBase&, ...)::{lambda(int)#1}>(int, ...)"
)
COPY = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda"
    "(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}>(at::TensorIteratorBase&)::{lambda(int)#1}>(int)"
)
NORM = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>(int, float, c10::BFloat16 const*)"
MEAN = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned int> >()"
)
FUSED = "void ditnorm::(anonymous namespace)::row_kernel<__nv_bfloat16, float, true>(ditnorm::Problem)"


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (ADD, "add"),
        (MUL, "Mul"),
        (COPY, "direct_copy"),
        (NORM, "vectorized_layer_norm"),
        (MEAN, "reduce Mean"),
        (FUSED, "ditnorm::row_kernel"),
        ("void rope_kernel<float>(int)", "rope_kernel"),
        ("triton_poi_fused_mul_add_12", "triton_poi_fused_mul_add"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("aten::native_layer_norm", "aten::native_layer_norm"),
    ],
)
def test_kernels_have_readable_names(kernel, name):
    assert kernel_shares.readable(kernel) == name


def test_kernels_outside_matmul_and_attention_add_up_by_name():
    float_add = ADD.replace("c10::BFloat16", "float")
    kernels = [kernel_shares.Kernel(*k) for k in ((ADD, 3, 2.0), (float_add, 1, 1.0), ("nvjet_tst_256x152", 4, 6.0), (FUSED, 2, 1.0))]
    assert kernel_shares.costs(kernels) == {"add": (4, 3.0), "ditnorm::row_kernel": (2, 1.0)}
    found = kernel_shares.shares(kernels)
    assert (found.kernels, found.busy_ms, found.matmul_ms) == (10, 10.0, 6.0)
    assert found.other == pytest.approx(0.4)


def test_profile_lists_what_costs_more_than_a_hundredth_in_either_column():
    columns = {"eager": {"shares": {"busy_ms": 10.0}}, "patched": {"shares": {"busy_ms": 5.0}}}
    costs = {"eager": {"norm": (4, 2.0), "rare": (1, 0.1), "add": (2, 0.15)}, "patched": {"ditnorm": (2, 1.0), "add": (1, 0.04)}}
    table = profile_table({"columns": columns, "costs": costs})
    rows = {line.split("   ")[0]: line.split()[-6:] for line in table.splitlines()[1:]}
    assert list(rows) == ["all of these and smaller ones", "norm", "ditnorm", "add"]
    assert rows["all of these and smaller ones"] == ["7", "2.25", "22.5%", "3", "1.04", "20.8%"]
    assert rows["add"] == ["2", "0.15", "1.5%", "1", "0.04", "0.8%"]


def test_profile_is_printed_for_each_model(bench, capsys):
    status, report = bench("--quick", "--profile", "--models", "wan2.1-1.3b")
    assert status == 0
    assert "all of these and smaller ones" in capsys.readouterr().out
    costs = report["models"]["wan2.1-1.3b"]["costs"]
    assert costs["eager"].keys() != costs["patched"].keys()


def test_a_pipeline_too_large_for_the_gpu_says_what_helps(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(bench_pipeline, "generate", full)
    with pytest.raises(SystemExit):
        bench_pipeline.main(["--out", str(tmp_path)])
    assert "--offload" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pipeline_offloading_without_a_gpu_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_pipeline.main(["--offload", "--out", str(tmp_path)])
    assert "no GPU" in capsys.readouterr().err


def test_pipeline_table_has_every_stage(tmp_path, capsys):
    assert bench_pipeline.main(["--steps", "2", "--runs", "1", "--prompt", "7", "--cache", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"^(text encoding|denoising|decoding|other|total) ", output, re.MULTILINE) == list(bench_pipeline.STAGES)
    times = json.loads((tmp_path / "pipeline.json").read_text())["milliseconds"]
    for column in times.values():
        assert column["denoising"] > 0
        assert column["decoding"] > 0
        assert sum(column[stage] for stage in bench_pipeline.STAGES[:-1]) == pytest.approx(column["total"])


def test_quantised_runs_have_a_page_of_their_own(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "compile_blocks", lambda model: model.compile_repeated_blocks(fullgraph=True, backend="eager"))
    _, quantised = bench("--models", "wan2.2-ti2v-5b", "--layers", "1", "--quantization", "int8-row")
    (entry,) = quantised["models"].values()
    assert {"eager", "patched", "compiled", "patched + compiled", "patched, bf16"} <= set(entry["columns"])
    records.take(tmp_path / "transformers.json", tmp_path)
    page = pages.quantised.written(tmp_path)["quantised"]
    assert quantised["command"] in page
    assert f"{entry['columns']['patched + compiled']['step_ms']:,.1f}" in page
    assert f"{entry['columns']['patched, bf16']['step_ms']:,.1f}" in page


@pytest.mark.parametrize("quantization", ["float8-row", "float8-tensor", "int8-row"])
def test_quantised_models_keep_the_bits_of_torchao(bench, quantization, capsys):
    """And stand beside the patched model in bf16."""
    pytest.importorskip("torchao")
    chosen = ["qwen-image", "wan2.1-1.3b"] if quantization == "float8-row" else ["hunyuan-video-480p"]
    status, report = bench("--quick", "--models", *chosen, "--quantization", quantization)
    output = capsys.readouterr().out
    assert status == 0, output
    assert list(report["models"]) == [f"{name}, {quantization}" for name in chosen]
    for entry in report["models"].values():
        names = [name for name in entry["columns"] if name != variants.PRECOMPUTED.name]
        assert names == ["eager", "patched", "patched, bf16"]
        assert entry["columns"]["patched"]["steps_identical"] == entry["steps_compared"]
        assert entry["quantization"] == quantization
    assert "times as fast as torchao in eager mode" in output
