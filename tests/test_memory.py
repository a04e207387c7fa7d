"""Peak memory of a forward pass: what patching keeps alive at the same time."""

import pytest
import torch
from support import tiny
from support.live_bytes import LiveBytes
from torch.utils._pytree import tree_leaves

from ditnorm import patch_model


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_patched_forward_pass_holds_no_more_memory(name: str) -> None:
    model, arguments = tiny.load(name, torch.bfloat16), tiny.inputs(name, 2, torch.bfloat16)

    def peak() -> int:
        tiny.run(model, arguments)  # fills caches of the model's own
        held = [*model.parameters(), *model.buffers(), *(a for a in tree_leaves(arguments) if isinstance(a, torch.Tensor))]
        with LiveBytes(iter(held)) as live:
            tiny.run(model, arguments)
        return live.peak

    upstream = peak()
    patch_model(model, strict=True)
    assert peak() <= upstream
