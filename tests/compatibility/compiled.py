"""``torch.compile`` in its forms, and ``torch.export``."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .feature import ORDERS, Feature, Upstream, arguments_of, calls_of, forward, load, output_of, unchanged, without


def graphs(target: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """The number of graphs that this run compiled."""
    torch._dynamo.utils.counters.clear()
    output = run()
    return output, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _whole(**how: Any) -> Callable[[nn.Module, Path], nn.Module]:
    def apply(model: nn.Module, folder: Path) -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(model, **how)  # type: ignore[return-value]

    return apply


def regional(**how: Any) -> Callable[[Any, Path], nn.Module]:
    def apply(model: Any, folder: Path) -> nn.Module:
        torch._dynamo.reset()
        model.compile_repeated_blocks(**how)
        return model

    return apply


@torch.no_grad()
def _batches(model: nn.Module, family: str) -> Tensor:
    """Two batch sizes; no other size of the models is 9 or 11, which Dynamo would take for the
    batch's.
    """
    outputs = []
    for batch in (9, 11):
        outputs.append(output_of(model, _batch(family, batch))[:2])
    return torch.stack(outputs)


def _batch(family: str, batch: int) -> dict[str, Any]:
    """The positions are the same for all samples."""
    return {k: v if k.endswith("_ids") else _repeated(v, batch) for k, v in arguments_of(family, batch=1).items()}


def _repeated(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat(batch, *[1] * (value.dim() - 1))
    return value * batch if isinstance(value, list) else value


def no_less_accurate(output: Tensor, expected: Tensor, family: str) -> None:
    """As near to a float32 run of the same weights as the unpatched eager model is.

    Inductor leaves out roundings inside the graphs between the fused ops and adds none. The ratio
    of two equal errors, each estimated from N samples that err independently, is 1 with a standard
    deviation of 1 / sqrt(N): four are allowed. All values of one sample err together.
    """
    eager = load(family)
    plain = forward(eager, family)
    exact = forward(eager.float(), family, dtype=torch.float32)
    assert _rms(output.float() - exact) <= _rms(plain.float() - exact) * (1 + 4 / math.sqrt(len(exact)))


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _exported(model: nn.Module, family: str) -> Tensor:
    """Of a copy: Z-Image keeps the positions that its first run made, fake ones under export."""
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), (), arguments_of(family) | {"return_dict": False}, strict=False)
        return output_of(program.module(), arguments_of(family))


def _no_more(found: int, upstream: int) -> bool:
    """Unpatching may take fewer: Dynamo knows by then what is dynamic."""
    return 0 < found <= upstream


def _one_more(found: int, upstream: int) -> bool:
    return found <= upstream + 1


_FIRST_BLOCK = (
    "HunyuanVideo compiles one graph more than upstream: the model hands its first block a channel-strided stream, which upstream's blocks "
    "pass on as it is and ditnorm's make dense"
)
REPEATED = without("SD3", "Lumina2")
"""Families whose models name their repeated blocks."""
_ALL = frozenset(ORDERS)
_ALL_BUT_ONE = _ALL - {"patch before"}
_HALF = _ALL - {"patch before", "patch after"}

# A compiler that sees the whole model leaves out what nothing reads: Qwen-Image's text stream after
# the last attention.
FEATURES = (
    Feature(
        '`torch.compile(backend="aot_eager")`',
        _whole(backend="aot_eager"),
        graphs,
        fused="any",
        agrees=_no_more,
        compiles=True,
        slow=_HALF,
    ),
    Feature(
        '`torch.compile(backend="aot_eager", dynamic=True)`',
        _whole(backend="aot_eager", dynamic=True),
        graphs,
        run=_batches,
        fused="any",
        agrees=_no_more,
        compiles=True,
        slow=_ALL,
    ),
    Feature(
        '`compile_repeated_blocks(fullgraph=True)`, `backend="aot_eager"`',
        regional(fullgraph=True, backend="aot_eager"),
        graphs,
        agrees=_one_more,
        compiles=True,
        families=REPEATED,
        note=_FIRST_BLOCK,
    ),
    Feature(
        "`compile_repeated_blocks(fullgraph=True)`",
        regional(fullgraph=True),
        graphs,
        bound=no_less_accurate,
        agrees=_one_more,
        compiles=True,
        families=REPEATED,
        note=_FIRST_BLOCK,
        slow=_ALL_BUT_ONE,
    ),
    Feature("`torch.compile`", _whole(), graphs, fused="any", agrees=_no_more, bound=no_less_accurate, compiles=True, slow=_ALL),
    Feature(
        "`torch.export`",
        unchanged,
        calls_of(torch.export, "export"),
        run_with=_exported,
        compiles=True,
        upstream={
            "Lumina2": Upstream(
                "unhashable type|data-dependent expression", "Lumina 2 joins text and picture by lengths that it reads from the mask"
            )
        },
        slow=_ALL_BUT_ONE,  # nothing is exported before a run
    ),
)
