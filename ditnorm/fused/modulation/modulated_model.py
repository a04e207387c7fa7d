"""What is known of a model whose modulations can come from a table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModulatedModel:
    """A model that hands the embedding of its timestep to ``takers``, and to nothing else."""

    names: frozenset[str]
    """Names of the upstream classes."""
    forward: frozenset[str]
    """Fingerprints of their ``forward``."""
    embedding: str
    """The module that makes the embedding. Each tensor that it returns is one."""
    takers: tuple[str, ...]
    """The modules that take the embedding; a ModuleList stands for its blocks."""
    times: int = 1
    """What the model multiplies the timestep by before it embeds it."""
    projection: str | None = None
    """The module that makes sines and cosines of the timestep, where ``embedding`` is given
    these.
    """
    changed_by: str | None = None
    """A module that only some instances have, and whose result the model adds to the embedding. No
    row number can stand in for the embedding there.
    """
    halved_if: str | None = None
    """An attribute of the model. Where it is true, the embedding has twice the batch, and its
    second half is that of timestep 0.
    """
    halved: tuple[str, ...] = ()
    """How the names of those modulations end that see only the first half then."""
