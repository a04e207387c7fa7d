"""Compiles the CUDA kernels with nvcc and g++ alone: no PyTorch, no package of any kind.

    python scripts/build_kernels.py             ditnorm/kernels/_C.so, for this machine's GPU or
                                                for all architectures
    python scripts/build_kernels.py --cpu-sim   the same kernels for the host (csrc/cpu_sim.h), for
                                                tests without a GPU; --sanitize: under sanitizers

Environment: CXX (default g++), DITNORM_NVCC or CUDA_HOME (where nvcc is), DITNORM_CUDA_ARCHS
("80,90": what to compile for), DITNORM_GLIBC ("2.28": the oldest glibc that the library is to run
with; default: that of this machine). The build hook (hatch_build.py) also reads DITNORM_CUDA: auto
(default), 0 (never compile), 1 (failing to is an error).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "ditnorm/kernels/csrc"
PYPI_NVCC = "cuda-toolkit[nvcc,cccl]==13.0.*"
PYPI_LINKER = "ziglang>=0.15"  # its linker knows the symbols of every glibc
ALL_ARCHS = ("80", "90", "100", "120")  # 80 also serves 86 and 89, 100 serves 103, 120 serves 121; the PTX of 80 serves the rest
OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA major version: the runtime is linked in, so the driver has to know it
HOST_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
# No contraction, so that the host's results are those of the kernels' intrinsics; kernels read
# tensors through vector types.
SIMULATOR_FLAGS = (*HOST_FLAGS, "-O1", "-ffp-contract=off", "-fno-strict-aliasing")
# Without what AddressSanitizer sees, too, which would take a third of the compiler's time.
SEEN_ANYWAY = "-fno-sanitize=null,object-size,pointer-overflow,vptr,nonnull-attribute,returns-nonnull-attribute"
SANITIZER_FLAGS = ("-fsanitize=address,undefined", SEEN_ANYWAY, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")


class BuildError(RuntimeError):
    """The kernels can't be compiled; the message says which command failed and how."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it."""

    arch: str  # "90" for compute capability 9.0
    driver: int  # 580 for driver 580.65.06


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says about one kernel on one architecture; sizes in bytes a thread."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def cxx() -> str:
    return os.environ.get("CXX", "g++")


def find_nvcc() -> str | None:
    """The first nvcc of DITNORM_NVCC, CUDA_HOME, PATH, /usr/local/cuda and the PyPI wheels on
    sys.path.
    """
    candidates = [os.environ.get("DITNORM_NVCC")]
    if cuda_home := os.environ.get("CUDA_HOME"):
        candidates.append(f"{cuda_home}/bin/nvcc")
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    candidates += [str(nvcc) for folder in sys.path for nvcc in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))]
    return next((nvcc for nvcc in candidates if nvcc and os.access(nvcc, os.X_OK)), None)


def find_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; empty without one or without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=compute_cap,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    found = [re.match(r"(\d+)\.(\d+), (\d+)\.", line) for line in lines]
    return [Gpu(arch=match[1] + match[2], driver=int(match[3])) for match in found if match]


def cuda_major(nvcc: str) -> int:
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout)
    if release is None:
        raise BuildError(f"{nvcc} --version names no release")
    return int(release[1])


def toolkit_root(nvcc: str) -> Path:
    """The toolkit's folder. Asks nvcc itself: the file on PATH may be a wrapper script or a
    link.
    """
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", plan)
    if top is None:
        raise BuildError(f"{nvcc} --dryrun doesn't tell where its toolkit is:\n{plan}")
    return Path(top[1]).resolve()


def static_runtime(root: Path) -> Path:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        library = root / folder / "libcudart_static.a"
        if library.exists():
            return library
    raise BuildError(f"no libcudart_static.a in the CUDA toolkit {root}")


def cuda_headers() -> list[Path]:
    """Include folders with cuda_runtime.h, of nvcc's toolkit or of the PyPI wheels
    nvidia-cuda-runtime, -crt and -cccl.
    """
    nvcc = find_nvcc()
    roots = [toolkit_root(nvcc)] if nvcc else []
    roots += [root for folder in sys.path for root in sorted(Path(folder).glob("nvidia/cu*"))]
    for root in roots:
        include = root / "include"
        if (include / "cuda_runtime.h").exists():
            return [include, include / "cccl"]
    raise BuildError(f'no CUDA headers: neither an nvcc nor the wheels of pip install "{PYPI_NVCC}"')


def target_archs() -> list[str]:
    """What to compile for: DITNORM_CUDA_ARCHS, else this machine's GPUs, else everything. Lowest
    first.

    Raises BuildError for a DITNORM_CUDA_ARCHS that names anything but compute capabilities from 8.0
    on.
    """
    if chosen := os.environ.get("DITNORM_CUDA_ARCHS"):
        archs = [arch.strip() for arch in chosen.split(",")]
        for arch in archs:
            if not (arch.isascii() and arch.isdecimal()):
                raise BuildError(f'DITNORM_CUDA_ARCHS takes numbers, "80,90" for compute capability 8.0 and 9.0, not {arch!r}')
            if int(arch) < int(ALL_ARCHS[0]):
                raise BuildError(f"DITNORM_CUDA_ARCHS: the kernels need compute capability 8.0 (80) or newer, not {arch}")
        return sorted(set(archs), key=int)
    present = {gpu.arch for gpu in find_gpus() if int(gpu.arch) >= int(ALL_ARCHS[0])}
    return sorted(present, key=int) or list(ALL_ARCHS)


def why_not() -> str | None:
    """Why the kernels can't be compiled on this machine, or wouldn't run on its GPU; None when
    nothing speaks against it.
    """
    if sys.platform != "linux":
        return f"the CUDA kernels are built on Linux only, not on {sys.platform}"
    if shutil.which(cxx()) is None:
        return f"no C++ compiler ({cxx()})"
    gpus = find_gpus()
    if gpus and max(int(gpu.arch) for gpu in gpus) < int(ALL_ARCHS[0]):
        return "no GPU of compute capability 8.0 or newer"
    nvcc = find_nvcc()
    if nvcc is None and not gpus:
        return "no nvcc in DITNORM_NVCC, CUDA_HOME, PATH or /usr/local/cuda, and no GPU that would call for the one from PyPI"
    oldest = OLDEST_DRIVER.get(cuda_major(nvcc) if nvcc else 13, 0)
    if gpus and gpus[0].driver < oldest:
        return f"the NVIDIA driver {gpus[0].driver} is older than {oldest}, which this CUDA toolkit needs"
    return None


def oldest_glibc() -> str | None:
    """DITNORM_GLIBC: the oldest glibc that the library is to run with."""
    return os.environ.get("DITNORM_GLIBC")


def link_command(flags: Sequence[str]) -> list[str]:
    """The start of the command that links a shared library, with the libraries of C++ where it
    doesn't find them by itself.
    """
    glibc = oldest_glibc()
    if glibc is None:
        return [cxx(), "-shared", *flags]
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError(f'DITNORM_GLIBC={glibc} needs the linker of pip install "{PYPI_LINKER}"')
    command = [cxx(), "-print-file-name=libstdc++.so", "-print-file-name=libgcc_s.so.1"]
    runtime = [subprocess.run([cxx(), option], capture_output=True, text=True, check=True).stdout.strip() for option in command[1:]]
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"x86_64-linux-gnu.{glibc}", "-shared", *runtime]


def run(label: str, command: Sequence[str | Path], verbose: bool = False, progress: Callable[[], str] = str) -> str:
    """Runs one build step and returns what it printed; raises BuildError with the command and its
    output when it fails. Prints how long it took, and the progress made.
    """
    arguments = [str(part) for part in command]
    if verbose:
        print("+", " ".join(arguments), flush=True)
    start = time.perf_counter()
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(f"{label} failed with exit status {done.returncode}:\n{' '.join(arguments)}\n{done.stdout}")
    print(f"{label}: {time.perf_counter() - start:.1f} s{progress()}", flush=True)
    return done.stdout


def workers() -> int:
    """How many files are compiled at a time."""
    return len(os.sched_getaffinity(0))


class Build:
    """One build in a temporary folder: objects first, then the library that takes them all."""

    def __init__(self, folder: Path, flags: Sequence[str], verbose: bool) -> None:
        self.folder = folder
        self.flags = flags
        self.verbose = verbose
        self.objects: list[Path] = []

    def compile(self, compiler: Sequence[str | Path], defines: Sequence[str] = ()) -> str:
        """Compiles the kernels with `compiler`, and the rest with g++, `workers()` at a time;
        returns what was printed.
        """
        host = [cxx(), *self.flags, "-Wall", "-Wextra", *defines]
        commands = [(compiler, source, self.folder / f"{source.stem}.o") for source in sorted(SOURCES.glob("*.cu"))]
        commands += [(host, source, self.folder / f"{source.stem}_binding.o") for source in sorted(SOURCES.glob("*.cpp"))]

        done = itertools.count(1)

        def compile_one(command: tuple[Sequence[str | Path], Path, Path]) -> str:
            program, source, target = command
            arguments = [*program, "-c", source, "-o", target]
            return run(f"compile {source.name}", arguments, self.verbose, lambda: f", {next(done)} of {len(commands)} files")

        with ThreadPoolExecutor(workers()) as pool:
            printed = list(pool.map(compile_one, commands))
        self.objects = [target for _, _, target in commands]
        return "".join(printed)

    def link(self, out: Path, libraries: Sequence[str | Path]) -> None:
        # A stub with the right soname gives DT_NEEDED libtorch.so without having PyTorch; `import
        # torch` has loaded the real one by then.
        stub = self.folder / "libtorch.so"
        stub_command = [cxx(), "-shared", "-x", "c++", os.devnull, "-o", str(stub), "-Wl,-soname,libtorch.so"]
        run("link the libtorch stub", stub_command, self.verbose)
        exports = self.folder / "exports.map"
        exports.write_text("{ global: ditnorm_*; local: *; };\n")
        linked = self.folder / "linked.so"
        inputs = [*self.objects, "-Wl,--no-as-needed", stub, "-Wl,--as-needed", *libraries]
        run(f"link {out.name}", [*link_command(self.flags), *inputs, f"-Wl,--version-script={exports}", "-o", linked], self.verbose)
        out.parent.mkdir(parents=True, exist_ok=True)
        # A new inode, never a rewritten file: a process may have the old library mapped.
        staged = out.with_name(f".{out.name}.new")
        shutil.copyfile(linked, staged)
        staged.chmod(0o755)
        staged.replace(out)


def code_targets(archs: Sequence[str]) -> list[str]:
    """Nvcc's options for machine code of `archs` (lowest first) and PTX of the lowest.

    The compiler's front takes much of the time, so it runs once for each set of features that the
    kernels use, not once for each arch: what comes with 9.0 (launch.h) is the only one.
    """
    options = []
    for group in ([arch for arch in archs if int(arch) < 90], [arch for arch in archs if int(arch) >= 90]):
        if group:
            code = [f"sm_{arch}" for arch in group] + [f"compute_{arch}" for arch in group[:1] if arch == archs[0]]
            options.append(f"-gencode=arch=compute_{group[0]},code=[{','.join(code)}]")
    return options


def build_cuda(out: Path, archs: Sequence[str], verbose: bool = False) -> list[KernelResources]:
    """Builds the CUDA library for `archs` (lowest first), with PTX of the lowest; returns every
    kernel's resources.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(f'no nvcc in DITNORM_NVCC, CUDA_HOME, PATH or /usr/local/cuda; pip install "{PYPI_NVCC}" is one way to get it')
    known = re.findall(r"compute_(\d+)", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout)
    if unknown := [arch for arch in archs if arch not in known]:
        raise BuildError(f"{nvcc} can't compile for {', '.join(unknown)}, only for {', '.join(known)}")
    runtime = static_runtime(toolkit_root(nvcc))
    code = f"{', '.join(f'sm_{arch}' for arch in archs)}, PTX of compute_{archs[0]}"
    print(f"{nvcc}: {code}; {workers()} files at a time, which takes minutes", flush=True)
    compiler = [nvcc, f"-ccbin={cxx()}", "-std=c++17", "-O3", f"-Xcompiler={','.join(HOST_FLAGS[2:])}", "-Xptxas=-v"]
    compiler += [*code_targets(archs), "--compress-mode=size"]
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder), HOST_FLAGS, verbose)
        printed = build.compile(compiler, [f'-DDITNORM_ARCHITECTURES="{",".join(archs)}"'])
        build.link(out, [runtime, "-ldl", "-lrt", "-lpthread", "-s"])
    return parse_ptxas(printed)


def build_simulator(out: Path, sanitize: bool, verbose: bool = False) -> None:
    """Builds the same kernels for the host; `sanitize` adds AddressSanitizer and
    UndefinedBehaviorSanitizer.
    """
    flags = (*SIMULATOR_FLAGS, *SANITIZER_FLAGS) if sanitize else SIMULATOR_FLAGS
    includes = [f"-I{folder}" for folder in cuda_headers()]
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder), flags, verbose)
        compiler = [cxx(), *flags, "-x", "c++", "-include", SOURCES / "cpu_sim.h", *includes]
        build.compile(compiler, ["-DDITNORM_CPU_SIM"])
        build.link(out, [])


def parse_ptxas(printed: str) -> list[KernelResources]:
    """Reads the output of ptxas -v."""
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    resources = [
        KernelResources(m["kernel"], m["arch"], int(m["registers"]), int(m["stack"]), int(m["stores"]), int(m["loads"]))
        for m in entry.finditer(printed)
    ]
    return sorted(resources, key=lambda r: (r.kernel, int(r.arch)))


def print_report(resources: Sequence[KernelResources]) -> None:
    names = sorted({r.kernel for r in resources})
    demangled = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    readable = {name: re.sub(r"^void |\([^()]*\)$", "", text) for name, text in zip(names, demangled, strict=True)}
    print("registers  stack  spilled  arch  kernel")
    for r in resources:
        print(f"{r.registers:9}  {r.stack:5}  {r.spill_stores + r.spill_loads:7}  {r.arch:>4}  {readable[r.kernel]}")
    print(f"{len(names)} kernels; at most {max(r.registers for r in resources)} registers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: ditnorm/kernels/_C.so, or build/cpu_sim[_sanitized].so")
    parser.add_argument("--cpu-sim", action="store_true", help="build the kernels for the host")
    parser.add_argument("--sanitize", action="store_true", help="with --cpu-sim: under AddressSanitizer and UBSan")
    parser.add_argument("--report", action="store_true", help="print registers, stack and spills of every kernel")
    parser.add_argument("--verbose", action="store_true", help="print the commands")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        if options.cpu_sim:
            name = "cpu_sim_sanitized.so" if options.sanitize else "cpu_sim.so"
            out = options.out or ROOT / "build" / name
            build_simulator(out, options.sanitize, options.verbose)
        else:
            out = options.out or SOURCES.parent / "_C.so"
            resources = build_cuda(out, target_archs(), options.verbose)
            if options.report:
                print_report(resources)
    except BuildError as error:
        sys.exit(f"build_kernels: {error}")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
