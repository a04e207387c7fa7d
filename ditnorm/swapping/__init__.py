"""Changing the class of a module in place, and what that has to respect.

* ``generated``: the class made of a body and the upstream class it stands in for
* ``hook_chains``: hooks that have captured a module's ``forward``, and moving them along
* ``swapped``: what such a module asks in each call: is upstream as it was, does anybody watch?
* ``fingerprint``, ``originals``, ``norm_kinds``: whether a function of diffusers or torch is a
known one
* ``callers``: which module called another
* ``block_registry``: diffusers' table of block classes
* ``torch_private``: PyTorch's private names, in one place
"""
