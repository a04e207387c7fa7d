"""Every model that ``bench_transformers.py`` measures, by the name that ``--models`` takes. A new
family is a file and a line here.
"""

from .families import flux, flux2, hunyuan_video, ltx2, lumina2, qwen_image, sd3, wan, z_image
from .real_model import RealModel

MODELS: dict[str, RealModel] = (
    qwen_image.MODELS
    | flux.MODELS
    | flux2.MODELS
    | wan.MODELS
    | hunyuan_video.MODELS
    | sd3.MODELS
    | z_image.MODELS
    | lumina2.MODELS
    | ltx2.MODELS
)
