"""The embedding of the timestep that names rows of a table."""

from typing import Any

import torch
from torch import Tensor

from ...swapping.swapped import untouched
from .table import ModulationTable


class RowEmbedding:
    """An embedding of timesteps that returns row numbers of the table, int64 [B], in place of each
    embedding [B, D].
    """

    modulations: ModulationTable

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        embedded = super().forward(*args, **kwargs)  # type: ignore[misc]
        tensors = embedded if isinstance(embedded, tuple) else (embedded,)
        if self._is_read_by_others(tensors[0].device.type):
            return embedded
        table = self.modulations
        given = dict(zip(table.inputs, args, strict=False)) | kwargs
        inputs = [value if isinstance(value := given.get(name), Tensor) else None for name in table.inputs]
        if torch.compiler.is_compiling():
            rows = [None if t is None else torch.ops.ditnorm.modulation_rows(t, inputs, i, table.handle) for i, t in enumerate(tensors)]
        else:
            rows = []
            for i, t in enumerate(tensors):
                of_one = None if t is None else table.rows(t, inputs, i)
                if of_one is None and t is not None:  # the weights are to be used
                    return embedded
                rows.append(of_one)
        return tuple(rows) if isinstance(embedded, tuple) else rows[0]

    def _is_read_by_others(self, device: str) -> bool:
        """Whether gradients go through it, or its dtype may change on the way, or a hook looks at
        it.
        """
        return torch.is_grad_enabled() or torch.is_autocast_enabled(device) or not untouched(self)
