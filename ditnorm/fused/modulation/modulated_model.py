"""What is known of a model whose modulations can come from a table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModulatedModel:
    """What a model does with the embedding of its timestep: it hands it to ``takers``, and nothing
    else reads it.
    """

    names: frozenset[str]
    """Names of the upstream classes."""
    forward: frozenset[str]
    """Fingerprints of their ``forward``."""
    embedding: str
    """The module that makes the embedding. Each tensor that it returns is one."""
    takers: tuple[str, ...]
    """Its ModuleLists of blocks and its modules that take it."""
    times: int = 1
    """By what it multiplies the timestep before it embeds it."""
    projection: str | None = None
    """The module that the timestep goes through before, where ``embedding`` is given sines and
    cosines of it.
    """
    changed_by: str | None = None
    """A module that only some instances have: what it makes is added to the embedding, for which
    no row numbers can stand in then.
    """
    halved_if: str | None = None
    """The attribute of the model that doubles the batch of the embedding, the second half for
    timestep 0; then ``halved``,
    """
    halved: tuple[str, ...] = ()
    """ends of the names of the modulations that see the first half only."""
