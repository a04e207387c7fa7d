"""Ovis-Image."""

from .configuration import Tiny
from .flux import FLUX, FLUX_CALLS, SMALL_HEADS, flux_inputs

MODELS = {
    "ovis-image": Tiny("OvisImageTransformer2DModel", FLUX | SMALL_HEADS | {"out_channels": 4}, flux_inputs(), FLUX_CALLS, 2 * 2 + 2),
}
