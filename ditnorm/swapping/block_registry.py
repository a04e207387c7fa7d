"""Makes generated block classes known to diffusers' caches, which look a block's class up in a table of exact types."""

import dataclasses


def register(generated: type, origin: type) -> None:
    """Registers ``generated`` with the metadata that diffusers holds for ``origin``, if it holds any."""
    if not origin.__module__.startswith("diffusers."):
        return
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry
    except ImportError:  # private, so it may move; then nothing looks blocks up there
        return
    try:
        metadata = TransformerBlockRegistry.get(origin)
    except ValueError:
        return
    TransformerBlockRegistry.register(generated, dataclasses.replace(metadata))
