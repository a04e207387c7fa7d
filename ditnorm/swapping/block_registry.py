"""Makes generated block classes known to diffusers' caches, which look a block's class up in a
table of exact types.
"""

import dataclasses
import sys


def register(generated: type, origin: type) -> None:
    """Registers ``generated`` with the metadata that diffusers holds for ``origin``, if it holds
    any.
    """
    if "diffusers" not in sys.modules:
        return
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        metadata = TransformerBlockRegistry.get(origin)
        TransformerBlockRegistry.register(generated, dataclasses.replace(metadata))
    # Not a block; or the table, which is private, moved or changed, and then caches find their own
    # way to a block's class.
    except (ImportError, ValueError, AttributeError, TypeError):
        return
