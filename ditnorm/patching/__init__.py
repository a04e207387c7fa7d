"""From a pipeline to swapped modules and back; knows no model.

* ``targets``: what users pass -> the models that can be fused
* ``units``: a model -> what can be swapped in it, or why not
* ``patch``: swaps, and undoes it
* ``verification``: the fused ops against the unfused expression, on the user's device
* ``modulation``, ``restoring``: modulations from a table, their weights in host memory, and back
* ``report``: what runs fused, what doesn't and why
* ``coverage``: which models of the installed diffusers can be fused
"""

from .modulation import precompute_modulation, restore_modulation
from .patch import patch_model, patch_pipeline, unpatch_model, unpatch_pipeline
from .report import report
from .verification import verify

__all__ = [
    "patch_model",
    "patch_pipeline",
    "precompute_modulation",
    "report",
    "restore_modulation",
    "unpatch_model",
    "unpatch_pipeline",
    "verify",
]
