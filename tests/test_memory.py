"""Peak memory of a forward pass: what patching keeps alive at the same time."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditnorm import patch_model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators have returned and somebody still holds. A fused op is one operator."""

    def __init__(self, known: Iterator[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


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
