"""Models sharded over two processes: with gloo on the CPU, with NCCL on two GPUs."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from . import parallel

_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < parallel.WORLD, reason="needs two GPUs")
BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, _TWO_GPUS])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", parallel.KINDS)
def test_a_patched_model_on_two_ranks_computes_what_the_unpatched_one_does(
    kind: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (kind, backend) == ("ring", "gloo"):
        pytest.skip("upstream's ring attention needs a backend that returns log-sum-exps; diffusers has none for the CPU")
    if backend == "gloo":  # where diffusers sees a GPU it takes the CPU for a mistake
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.multiprocessing.spawn(parallel.rank, (backend, kind, str(tmp_path)), nprocs=parallel.WORLD)
    failures = [
        (rank, *failure) for rank in range(parallel.WORLD) for failure in json.loads((tmp_path / f"{rank}.json").read_text()).items()
    ]
    assert not failures, "\n".join(f"rank {rank}, {case}:\n{error}" for rank, case, error in failures)
