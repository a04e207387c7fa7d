"""The gradients of all ops that have kernels for them."""

from collections.abc import Mapping

from . import gradients_activation, gradients_norm, gradients_qk
from .autograd import Gradients

GRADIENTS: Mapping[str, Gradients] = {**gradients_norm.GRADIENTS, **gradients_qk.GRADIENTS, **gradients_activation.GRADIENTS}
"""By the op's name."""
