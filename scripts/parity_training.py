"""Shows that a patched model trains with the gradients of the unpatched one, bit for bit: one step
of real models with random weights, at full size, one block of each kind.

    python scripts/parity_training.py [--models NAME ...] [--plans NAME ...]

Left to itself, PyTorch adds the gradients of attention in an order that changes from run to run.
Here it is asked for deterministic kernels, and eager's gradients are made twice: how many of them
are equal then says what the comparison is worth. The exit status is 1 if a gradient differs that
eager repeats. Real sizes need a GPU; on a CPU they take minutes.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat its sums; read once
# The checkout's ditnorm, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from bench.models.catalogue import MODELS
from bench.models.real_model import RealModel
from bench.training.plans import MODELS as TRAINED
from bench.training.plans import PLANS, Plan
from bench.training.steps import loss_of
from common.execution import free
from common.tables import environment_line, text_table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ditnorm

REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
MASKED = frozenset({"hunyuan-video-480p"})
"""Names of models whose attention has a mask, which flash attention doesn't take, and is too long
for plain operations. They run in the kernel that is left, which can't repeat its sums.
"""
LORA = 0.02
"""Standard deviation of what is added to the trained weights: the gradient of a LoRA's first matrix
is zero where the second one is.
"""


def compared(real: RealModel, kinds: Iterable[str], plan: Plan, device: torch.device) -> tuple[int, int, list[str]]:
    """How many weights are trained, how many of their gradients eager repeats, and which of those
    the patched model has otherwise. ``kinds``: of blocks, of which there is to be one each.
    """
    model = real.build(dict.fromkeys(kinds, 1), device)
    trained = plan.prepare(model)
    generator = torch.Generator(device).manual_seed(3)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype), alpha=LORA)
    loss = loss_of(model, real, device)

    def gradients() -> dict[str, Tensor | None]:
        loss().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for p in trained:
            p.grad = None
        return found

    eager, again = gradients(), gradients()
    ditnorm.patch_model(model, strict=True)
    patched = gradients()
    repeated = [name for name, grad in eager.items() if same(grad, again[name])]
    return len(eager), len(repeated), [name for name in repeated if not same(eager[name], patched[name])]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare the gradients of patched and unpatched models bit by bit.")
    plans = {plan.name: plan for plan in PLANS}
    parser.add_argument(
        "--models", nargs="+", choices=list(TRAINED), default=list(TRAINED), metavar="NAME", help=f"of {', '.join(TRAINED)}"
    )
    parser.add_argument("--plans", nargs="+", choices=list(plans), default=["LoRA"], metavar="NAME", help=f"of {'; '.join(plans)}")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{environment_line(device)}\n")
    rows, status = [["model", "trained", "gradients", "eager repeats", "of these patched has"]], 0
    try:
        for name in options.models:
            torch.use_deterministic_algorithms(True, warn_only=name in MASKED)
            for plan in (plans[name] for name in options.plans):
                with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION] if name in MASKED else REPEATABLE):
                    count, repeated, different = compared(MODELS[name], TRAINED[name], plan, device)
                rows.append([MODELS[name].title, plan.name, str(count), str(repeated), str(repeated - len(different))])
                for parameter in different:
                    print(f"{MODELS[name].title}, {plan.name}: the gradient of {parameter} differs")
                status |= bool(different)
                free()
    finally:
        torch.use_deterministic_algorithms(False)
    print(text_table(rows))
    return status


if __name__ == "__main__":
    sys.exit(main())
