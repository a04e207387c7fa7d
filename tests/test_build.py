"""The compiled library and the packaging: what no test of the ops would notice."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import packaging.utils
import pytest
import torch

import ditnorm
from ditnorm import kernels
from ditnorm.kernels import compiled

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "ditnorm/kernels/csrc"
NOT_BUILT = "ditnorm/kernels/_not_built.txt"
SYSTEM_LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_kernels = load_script("build_kernels")


def output_of(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def tool(name: str) -> str:
    """A CUDA binary tool, of the PyPI wheels or of the toolkit."""
    nvcc = build_kernels.find_nvcc()
    folders = [folder for path in sys.path for folder in Path(path).glob("nvidia/cu*/bin")]
    folders += [build_kernels.toolkit_root(nvcc) / "bin"] if nvcc else []
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if found is None:
        pytest.skip(f"no {name}: pip install nvidia-cuda-{name}")
    return found


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for all architectures: the one that DITNORM_BUILT_LIBRARY names, else built
    here.
    """
    if built := os.environ.get("DITNORM_BUILT_LIBRARY"):
        return Path(built).resolve()
    if build_kernels.find_nvcc() is None:
        pytest.skip("no nvcc: the test extra brings it")
    out = tmp_path_factory.mktemp("library") / "_C.so"
    build_kernels.build_cuda(out, build_kernels.ALL_ARCHS)
    return out


# ---- Machine code


@pytest.fixture(scope="session")
def stack_and_local(library: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes of stack and of local memory that a thread of each kernel takes: ``(architecture,
    mangled name) -> ...``.
    """
    usage = re.compile(r"arch = sm_(?P<arch>\w+)|Function (?P<kernel>\w+):\s+REG:\d+ STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")
    found, arch = {}, ""
    for match in usage.finditer(output_of(tool("cuobjdump"), "--dump-resource-usage", library)):
        arch = match["arch"] or arch
        if match["kernel"]:
            found[arch, match["kernel"]] = int(match["stack"]), int(match["local"])
    return found


disassembled = pytest.mark.xdist_group("disassembled")  # by one worker, for as long as all the rest takes another


@pytest.fixture(scope="session")
def opcodes(library: Path) -> dict[str, set[str]]:
    """The distinct opcodes of each kernel of one architecture, by its mangled name: ``{"LDG.E.128",
    ...}``.
    """
    search_path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])
    listing = output_of(tool("cuobjdump"), "-sass", "-arch", "sm_90", library, env={**os.environ, "PATH": search_path})
    found: dict[str, set[str]] = {}
    current = set[str]()
    for line in listing.splitlines():
        if match := re.match(r"\s+Function : (\w+)", line):
            current = found.setdefault(match[1], set())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", line):
            current.add(match[1])
    return found


def test_every_architecture_has_every_kernel(stack_and_local: dict[tuple[str, str], tuple[int, int]]) -> None:
    kernels = {arch: {name for a, name in stack_and_local if a == arch} for arch in build_kernels.ALL_ARCHS}
    assert {arch for arch, _ in stack_and_local} == set(kernels)
    assert any("row_kernel" in name for name in kernels["80"])
    assert all(names == kernels["80"] for names in kernels.values())


def test_library_tells_its_architectures(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FILE", library)
    assert compiled.architectures(kernels.FILE) == list(build_kernels.ALL_ARCHS)


def test_newer_gpus_can_compile_the_ptx_of_the_lowest_architecture(library: Path) -> None:
    assert re.findall(r"sm_(\d+)\.ptx", output_of(tool("cuobjdump"), "--list-ptx", library)) == ["80"] * len(list(CSRC.glob("*.cu")))


def test_no_kernel_spills_or_uses_local_memory(stack_and_local: dict[tuple[str, str], tuple[int, int]]) -> None:
    assert [kernel for kernel, used in stack_and_local.items() if used != (0, 0)] == []


@disassembled
@pytest.mark.parametrize("access", ["LDG", "STG"])
def test_fast_kernels_move_rows_in_wide_accesses(access: str, opcodes: dict[str, set[str]]) -> None:
    narrow = []
    for name, used in opcodes.items():
        if re.search(r"generic_(backward_)?kernel|any_(qk|quantize|activation|swiglu|mean_norm)_(backward_)?kernel", name):
            continue  # for all that the fast ones don't take
        if re.search(r"probe_kernel|maxima_kernel", name):
            continue  # of a few numbers
        if access == "STG" and re.search(r"(row_kernelI\w*ELb[01]ELb[01]ELb1E|walking_kernelI|quantize_kernel[IE]|amax_kernelI)", name):
            # A thread's quantised values are a byte each: 4 to 16 bytes of them, in one access. The
            # dequantised are stored two by two.
            narrow += [name] if any(re.match(r"STG\.E\.[US](8|16)\b", opcode) for opcode in used) else []
            continue
        if "lone_mean_norm_backward_kernel" in name:  # a thread has two neighbouring sums of ATen's, and their columns: 4 bytes
            narrow += [name] if f"{access}.E" not in used or any(re.match(rf"{access}\.E\b.*\.U16\b", opcode) for opcode in used) else []
            continue
        # A thread that is one of ATen's lanes takes 4 elements at a time: 8 bytes in half
        # precision.
        one_lane = "ShapeILi1E" in name or re.search(r"across_(backward_)?kernelI.*ELi1E(Lb[01]E)?EEv", name)
        wide = re.compile(rf"{access}\.E\b.*\.({'64' if one_lane and '_kernelIf' not in name else '128'}|256)\b")
        if not any(wide.match(opcode) for opcode in used):
            narrow.append(name)
    assert narrow == []


@disassembled
def test_no_kernel_rounds_to_bfloat16_number_by_number(opcodes: dict[str, set[str]]) -> None:
    """That goes through a unit a quarter as fast as the one for pairs, which took a third of the
    time of diffusers' RMSNorm.
    """
    assert [name for name, used in opcodes.items() if any(opcode.startswith("F2F.BF16") for opcode in used)] == []


# ---- The shared library


def test_library_is_small(library: Path) -> None:
    """A kernel that no served model selects isn't built. A twentieth more than it was last."""
    assert library.stat().st_size <= 12.0e6


def test_library_needs_libtorch_and_the_system_only(library: Path) -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-dW", library)))
    assert "libtorch.so" in needed
    assert needed - {"libtorch.so"} <= SYSTEM_LIBRARIES  # so no libcudart: one library serves every CUDA build of PyTorch


def test_library_uses_no_python_and_no_unstable_torch_symbol(library: Path) -> None:
    symbols = re.findall(r"\b[Uw] (\w+)", output_of("nm", "--dynamic", "--undefined-only", library))
    assert [symbol for symbol in symbols if re.match(r"_?Py", symbol)] == []
    assert [symbol for symbol in symbols if re.search(r"torch|at::|c10", symbol) and not symbol.startswith("aoti_torch_")] == []


def test_library_exports_its_own_functions_only(library: Path) -> None:
    """Not those of the CUDA runtime that is linked in: PyTorch has its own."""
    exported = re.findall(r" [A-Zu] (\w+)", output_of("nm", "--dynamic", "--defined-only", library))
    assert exported
    assert all(symbol.startswith("ditnorm_") for symbol in exported)


def test_torch_abi_audit_calls_the_library_stable(library: Path) -> None:
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if audit is None:
        pytest.skip("no torch-abi-audit: it needs Python 3.11")
    report = output_of(audit, "--check", "torch", library)
    assert "STABLE" in report
    assert (minimum := re.search(r"Min torch: +(\d+)\.(\d+)", report))
    assert (int(minimum[1]), int(minimum[2])) <= (2, 10)


def test_hand_declared_abi_agrees_with_pytorch() -> None:
    include = Path(torch.__file__).parent / "include"
    header = "torch/csrc/inductor/aoti_torch/c/shim.h"
    output_of("g++", "-std=c++17", "-fsyntax-only", "-DUSE_CUDA", "-include", header, f"-I{include}", *CSRC.glob("*.cpp"))


def test_library_loads_into_this_pytorch_and_registers_when_told(library: Path) -> None:
    program = (
        "import ctypes, sys, torch, ditnorm.kernels\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "dump = lambda: [torch._C._dispatch_dump(f'ditnorm::{op}') for op in ditnorm.kernels.OPS]\n"
        "loaded = dump()\n"
        "assert library.ditnorm_register() == 0\n"
        "assert all(before != after for before, after in zip(loaded, dump(), strict=True))\n"
    )
    output_of(sys.executable, "-c", program, library, cwd=ROOT, env={**os.environ, "DITNORM_KERNELS": "0"})


def test_both_sides_know_the_same_ops_and_codes_of_options(library: Path) -> None:
    opened = compiled.opened(library)
    assert compiled.differs(opened) is None
    assert opened.ditnorm_calls(b"no_such_op") == -1
    assert opened.ditnorm_code(b"norm", b"no such norm") == opened.ditnorm_code(b"no such option", b"layer") == -1


def test_library_of_other_sources_is_refused(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = "is of another version of ditnorm: build it again"
    older = tmp_path / "older.so"
    output_of("g++", "-shared", "-x", "c++", os.devnull, "-o", older)
    assert kernels._register(older, "cuda", 0) == f"{older.name} {refusal}"
    monkeypatch.setattr(compiled, "NORMS", ("rms", "layer", "fp32_layer"))
    assert kernels._register(library, "cuda", 0) == f"{library.name} {refusal}"
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "OPS", (*kernels.OPS, "no_such_op"))
    assert kernels._register(library, "cuda", 0) == f"{library.name} {refusal}"


@pytest.mark.gpu
def test_forked_child_can_use_cuda_after_import() -> None:
    program = (
        "import os, sys, torch, ditnorm\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.zeros(1, device='cuda')\n"
        "    os._exit(0)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    output_of(sys.executable, "-c", program, cwd=ROOT)


# ---- Packaging


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project whose kernels compile in seconds."""
    shutil.copytree(ROOT / "ditnorm", tmp_path / "ditnorm", ignore=shutil.ignore_patterns("*.so", "__pycache__", "csrc"))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    sources = tmp_path / "ditnorm/kernels/csrc"
    sources.mkdir()
    (sources / "kernels.cu").write_text("__global__ void nothing() {}\n")
    (sources / "ops.cpp").write_text("// no ops\n")
    return tmp_path


def build(project: Path, kind: str, **environment: str) -> str:
    """Runs a PEP 517 hook as pip would, without its isolation; returns the file name of what it
    made in dist/.
    """
    program = f"import sys; sys.path.insert(0, 'scripts'); import build_backend; print(build_backend.build_{kind}('dist'))"
    printed = output_of(sys.executable, "-c", program, cwd=project, env={**os.environ, "DITNORM_CUDA_ARCHS": "80", **environment})
    return next(line for line in printed.splitlines() if line.endswith((".whl", ".tar.gz")))


@functools.cache
def needs_nvcc() -> None:
    if build_kernels.find_nvcc() is None:
        pytest.skip("no nvcc: the test extra brings it")


def test_wheel_without_kernels_is_pure_and_says_why_in_its_name_and_at_run_time(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that an editable install left in the tree isn't taken for it."""
    (project / NOT_BUILT).write_text("stale")
    wheel = build(project, "wheel", DITNORM_CUDA="0")
    assert wheel == f"ditnorm-{ditnorm.__version__}-0nokernels-py3-none-any.whl"
    names = zipfile.ZipFile(project / "dist" / wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert names.count(NOT_BUILT) == 1
    installed = Path(zipfile.ZipFile(project / "dist" / wheel).extract(NOT_BUILT, project / "installed"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels, "FILE", installed.with_name("_C.so"))
    monkeypatch.setattr(kernels, "_NOT_BUILT", installed)
    monkeypatch.delenv("DITNORM_LIBRARY", raising=False)
    assert kernels._unavailable() == "ditnorm was installed without compiled kernels (DITNORM_CUDA=0)"


@pytest.mark.parametrize(("archs", "build_tag"), [("90", "-0sm90"), ("90,80", "-0sm80_sm90"), (",".join(build_kernels.ALL_ARCHS), "")])
def test_the_name_of_a_wheel_tells_which_kernels_it_has(archs: str, build_tag: str, project: Path) -> None:
    needs_nvcc()
    wheel = build(project, "wheel", DITNORM_CUDA="1", DITNORM_CUDA_ARCHS=archs)
    assert wheel.startswith(f"ditnorm-{ditnorm.__version__}{build_tag}-py3-none-linux_")
    assert packaging.utils.parse_wheel_filename(wheel)[0] == "ditnorm"  # as pip reads it


def test_wheel_with_kernels_serves_every_python_and_leaves_the_tree_clean(project: Path) -> None:
    needs_nvcc()
    wheel = build(project, "wheel", DITNORM_CUDA="1")
    assert "-py3-none-linux_" in wheel
    names = zipfile.ZipFile(project / "dist" / wheel).namelist()
    assert NOT_BUILT not in names
    assert "ditnorm/kernels/_C.so" in names
    assert "ditnorm/py.typed" in names
    assert not [name for name in names if "csrc" in name]
    assert not (project / "ditnorm/kernels/_C.so").exists()


def test_editable_install_puts_the_library_into_the_tree(project: Path) -> None:
    needs_nvcc()
    build(project, "editable", DITNORM_CUDA="1")
    assert (project / "ditnorm/kernels/_C.so").exists()


def test_editable_install_without_kernels_removes_a_stale_library(project: Path) -> None:
    stale = project / "ditnorm/kernels/_C.so"
    stale.touch()
    build(project, "editable", DITNORM_CUDA="0")
    assert not stale.exists()
    assert (project / NOT_BUILT).read_text() == "DITNORM_CUDA=0\n"


def test_source_distribution_can_build_the_kernels(project: Path) -> None:
    listing = output_of("tar", "--list", "--file", project / "dist" / build(project, "sdist"))
    for name in ("ditnorm/kernels/csrc/kernels.cu", "ditnorm/kernels/csrc/ops.cpp", "scripts/build_kernels.py", "scripts/hatch_build.py"):
        assert f"/{name}\n" in listing


def test_tests_run_from_the_source_distribution(tmp_path: Path) -> None:
    program = f"import hatchling.build; hatchling.build.build_sdist({str(tmp_path)!r})"
    output_of(sys.executable, "-c", program, cwd=ROOT)
    (archive,) = tmp_path.glob("ditnorm-*.tar.gz")
    assert archive.stat().st_size < 12e6
    output_of("tar", "--extract", "--file", archive, "--directory", tmp_path)
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_loading.py", "tests/test_links.py"]
    output_of(*pytest, cwd=unpacked, env={**os.environ, "PYTHONPATH": str(unpacked)})


NEW_GPU = [build_kernels.Gpu(arch="90", driver=580)]
OLD_DRIVER = [build_kernels.Gpu(arch="90", driver=550)]
OLD_GPU = [build_kernels.Gpu(arch="75", driver=580)]


@pytest.mark.parametrize(
    ("mode", "gpus", "fetched"),
    [
        ("auto", NEW_GPU, True),
        ("auto", OLD_DRIVER, False),
        ("auto", OLD_GPU, False),
        ("auto", [], False),
        ("0", NEW_GPU, False),
        ("1", [], True),
    ],
)
def test_nvcc_is_fetched_only_where_its_library_would_run(
    mode: str, gpus: list[object], fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = make_hook(monkeypatch, mode, gpus)
    assert hook.dependencies() == ([build_kernels.PYPI_NVCC] if fetched else [])


@pytest.mark.parametrize(("gpus", "reason"), [([], "no nvcc"), (OLD_DRIVER, "driver 550 is older than 580"), (OLD_GPU, "8.0 or newer")])
def test_required_kernels_that_cannot_be_built_fail_the_install(
    gpus: list[object], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hook = make_hook(monkeypatch, "1", gpus)
    with pytest.raises(RuntimeError, match=f"DITNORM_CUDA=1, but.*{reason}"):
        hook.initialize("standard", {})


def make_hook(monkeypatch: pytest.MonkeyPatch, mode: str, gpus: list[object]) -> object:
    """The build hook on a machine with these GPUs and no nvcc."""
    hatch_build = load_script("hatch_build")
    monkeypatch.setenv("DITNORM_CUDA", mode)
    monkeypatch.setattr(hatch_build.build_kernels, "find_nvcc", lambda: None)
    monkeypatch.setattr(hatch_build.build_kernels, "find_gpus", lambda: gpus)
    return hatch_build.CustomBuildHook(str(ROOT), {}, None, None, "", "wheel")


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ("75", r"^DITNORM_CUDA_ARCHS: the kernels need compute capability 8\.0 \(80\) or newer, not 75$"),
        ("sm_90", r"^DITNORM_CUDA_ARCHS takes numbers, \"80,90\" for compute capability 8\.0 and 9\.0, not 'sm_90'$"),
        ("80,9.0", r"not '9\.0'$"),
        ("80,", r"not ''$"),
    ],
)
def test_architectures_that_cannot_be_are_named(chosen: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITNORM_CUDA_ARCHS", chosen)
    with pytest.raises(build_kernels.BuildError, match=sentence):
        build_kernels.target_archs()


def test_architectures_are_compiled_once_and_lowest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITNORM_CUDA_ARCHS", "120, 80,90,80")
    assert build_kernels.target_archs() == ["80", "90", "120"]


def test_architecture_that_this_nvcc_does_not_know_is_named(tmp_path: Path) -> None:
    needs_nvcc()
    with pytest.raises(build_kernels.BuildError, match=r"can't compile for 85, only for .*80"):
        build_kernels.build_cuda(tmp_path / "_C.so", ["80", "85"])


def test_a_linker_for_an_older_glibc_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITNORM_GLIBC", "2.28")
    monkeypatch.setattr(build_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build_kernels.BuildError, match=r'DITNORM_GLIBC=2\.28 needs the linker of pip install "ziglang'):
        build_kernels.link_command([])


def test_failing_compiler_is_quoted() -> None:
    with pytest.raises(build_kernels.BuildError, match=r"(?s)compile x\.cu failed with exit status 3.*error: nope"):
        build_kernels.run("compile x.cu", ["sh", "-c", "echo error: nope >&2; exit 3"])
