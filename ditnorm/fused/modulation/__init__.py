"""Modules whose modulations come from a table: a row for each timestep, made once, instead of
Linears that run in every step.
"""

from .modulating import ModulatedModel, Modulating

__all__ = ["ModulatedModel", "Modulating"]
