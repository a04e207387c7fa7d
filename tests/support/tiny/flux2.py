"""FLUX.2."""

from .configuration import Tiny
from .flux import FLUX, FLUX_CALLS, flux_inputs

_FLUX2 = FLUX | {"timestep_guidance_channels": 8, "axes_dims_rope": (16, 16, 16, 16)}


MODELS = {
    "flux2": Tiny("Flux2Transformer2DModel", _FLUX2, flux_inputs("guidance", axes=4), FLUX_CALLS, 2 * 2 + 2),
    "flux2-klein": Tiny(
        "Flux2Transformer2DModel",
        _FLUX2 | {"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
        flux_inputs(axes=4),
        FLUX_CALLS,
        2 * 2 + 2,
    ),
}
