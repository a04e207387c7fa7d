"""What patching a quantised model is to be worth."""

from collections.abc import Mapping
from typing import Any

from .variants import BF16, EAGER, PATCHED

SPEED = "times as fast as torchao in eager mode"
OVER_BF16 = "times as fast as the patched model in bf16"
OVER_COMPILED = "times as fast as compiled"
OTHER = "times the GPU time outside matmul and attention of the patched model in bf16"


def gains(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What patching a quantised model is worth, from the columns of its entry."""
    ms = {name: column["step_ms"] for name, column in columns.items()}
    other = {name: column["shares"]["busy_ms"] * column["other_share"] for name, column in columns.items()}
    found = {SPEED: ms[EAGER.name] / ms[PATCHED.name], OVER_BF16: ms[BF16.name] / ms[PATCHED.name]}
    if "compiled" in ms:
        found[OVER_COMPILED] = ms["compiled"] / ms[PATCHED.name]
    return found | {OTHER: other[PATCHED.name] / other[BF16.name]}
