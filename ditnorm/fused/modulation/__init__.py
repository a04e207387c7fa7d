"""Modules whose modulations come from a table: a row for each timestep, made once, instead of
Linears that run in every step.

How a row is found: the embedding of the timestep (:class:`RowEmbedding`) is asked once a forward
pass. It computes upstream's ``temb``, looks its bits up and hands row numbers, int64 [B], to the
model in its place. Upstream's code passes them on untouched, and a module that makes modulations
(:class:`Modulating`) takes an integer for a row and a float for an embedding. A block does nothing
but gather: no wait, no look-up, nothing that ``torch.compile`` or a CUDA graph would mind. The key
is bits of what goes into the Linears, so that nothing about guidance, pooled text or additional
conditions has to be known.

The weights stay the Parameters they are, in host memory. Where an embedding arrives after all
(training, autocast, a hook that looks at it) they cross to it, and the result is upstream's.
"""

from .modulated_model import ModulatedModel
from .modulating import Modulating

__all__ = ["ModulatedModel", "Modulating"]
