"""Brings back what :mod:`ditnorm.patching.modulation` took off the device."""

import logging
from collections.abc import Mapping

from torch import nn

from ..fused.modulation.table import ModulationTable

_log = logging.getLogger("ditnorm")


def restore(models: Mapping[str, nn.Module]) -> None:
    """Brings the weights of precomputed modulations back, in ``models`` and in the models inside
    them.
    """
    for name, model in models.items():
        for table in tables(model):
            table.restore()
            _log.info("%s: %d modulations restored", name, len(table.modules))


def tables(model: nn.Module) -> list[ModulationTable]:
    """The tables of ``model`` and of the models inside it."""
    return [module.__dict__["modulations"] for module in model.modules() if "modulations" in module.__dict__]
