"""How far one denoising step of a real model is from float32: upstream's, patched with either
rounding, and compiled.

float32 is upstream's own forward with the same bf16 weights and inputs, upcast, and without TF32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common.execution import full_float32
from common.tables import text_table
from pipelines.similarity import relative_error
from torch import Tensor, nn

from .real_model import RealModel
from .variants import EAGER, SINGLE, VARIANTS, Variant

EXACT = [variant.name for variant in VARIANTS if variant.exact]
# Of a model: float32 attention is 4 * S^2 * D operations a block, at 118,800 tokens 5 s with 40
# TFLOP/s.
BLOCKS = 2


@dataclass(frozen=True)
class Error:
    """What the model makes in bf16, against float32."""

    relative: float
    """``|output - float32| / |float32|`` in the Euclidean norm."""
    psnr: float
    """dB; the peak is the largest magnitude of float32."""
    chance: float
    """Standard error of ``relative`` divided by that of eager, near which two ways that are equally
    far come out by chance.
    """


def error(output: Tensor, eager: Tensor, exact: Tensor) -> Error:
    """``output`` measured against ``exact``, in float64. ``chance`` takes the values' errors for
    independent.
    """
    exact = exact.double()
    squares, squares_eager = ((t.double() - exact).square() for t in (output, eager))
    psnr = 10 * (exact.square().max() / squares.mean()).log10()
    # sqrt(1 + x) is 1 + x / 2.
    chance = (squares - squares_eager).square().sum().sqrt() / (2 * squares_eager.sum())
    return Error(relative_error(output, exact), psnr.item(), chance.item())


def forward(model: nn.Module, real: RealModel, device: torch.device, *, upcast: bool = False) -> Tensor:
    """The model's velocity at the first step, on the CPU. ``upcast``: from inputs in float32, with
    the values of those in bf16.
    """
    arguments = real.arguments(real, real.noise(device), torch.tensor(1000.0, device=device))
    if upcast:
        arguments = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    with torch.inference_mode():
        return real.velocity(model, arguments).cpu()


def measure(real: RealModel, layers: Mapping[str, int], device: torch.device, variants: Sequence[Variant]) -> dict[str, Any]:
    """Runs one model in every variant, eager first, with at most :data:`BLOCKS` of its ``layers``.

    Returns, for a JSON: ``layers`` that were run, ``errors`` of each variant, and ``identical``,
    whether those that must have the bits of eager do.
    """
    layers = {kind: min(n, BLOCKS // len(layers)) for kind, n in layers.items()}
    model = real.build(layers, device)
    outputs: dict[str, Tensor] = {}
    for variant in variants:
        with variant.applied(model):
            outputs[variant.name] = forward(model, real, device)
    eager = outputs[EAGER.name]
    with full_float32():  # in place: one model at a time in memory
        exact = forward(model.float(), real, device, upcast=True)
    return {
        "layers": layers,
        "identical": all(torch.equal(outputs[variant.name], eager) for variant in variants if variant.exact),
        "errors": {name: asdict(error(output, eager, exact)) for name, output in outputs.items()},
    }


def holds(found: Mapping[str, Any]) -> bool:
    """Whether, of what :func:`measure` found, patched has the bits of eager, and single rounding is
    no further from float32 than eager.

    Wan rounds once with either, so that chance decides which is nearer: three standard errors are
    allowed.
    """
    eager, single = found["errors"][EAGER.name], found["errors"][SINGLE.name]
    # Not if any is NaN.
    return found["identical"] and single["relative"] <= eager["relative"] * (1 + 3 * single["chance"])


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """What was found, by model, as text."""
    rows = [["error of one step against float32", "blocks", "", "relative", "vs eager", "PSNR dB", "bits"]]
    for entry in entries.values():
        found = entry["accuracy"]
        eager = found["errors"][EAGER.name]["relative"]
        for name, measured in found["errors"].items():
            first = name == EAGER.name
            rows.append(
                [
                    entry["title"] if first else "",
                    blocks(found) if first else "",
                    name,
                    f"{measured['relative']:.3e}",
                    "" if first else f"{measured['relative'] / eager - 1:+.2%} ± {measured['chance']:.2%}",
                    f"{measured['psnr']:.1f}",
                    ("equal" if found["identical"] else "differ") if name in EXACT else "",
                ]
            )
    return text_table(rows)


def blocks(found: Mapping[str, Any]) -> str:
    """How many of each kind were run."""
    return " + ".join(map(str, found["layers"].values()))
