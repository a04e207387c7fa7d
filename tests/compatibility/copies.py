"""Copies, pickles, saved models; models converted after they were patched."""

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from support import tiny
from torch import Tensor, nn

from ditnorm import patch_model
from ditnorm.swapping import generated

from .feature import DEVICE, Feature, arguments_of, forward, its_output, load, weights_at_rest
from .offload import blocks_of


def _another(make: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Any]:
    """What ``make`` makes of a model, with weights changed, so that it shows which of the two
    runs.
    """

    def apply(model: nn.Module, folder: Path) -> nn.Module:
        made = make(model, folder)
        with torch.no_grad():
            for p in blocks_of(made)[0].parameters():
                if type(p.data) is Tensor:  # quantised ones aren't multiplied
                    p.mul_(0.5)
        return made

    return apply


def _pickle(model: nn.Module, folder: Path) -> Any:
    return pickle.loads(pickle.dumps(model))


def _torch_save(model: nn.Module, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def _save_pretrained(model: Any, folder: Path) -> Any:
    """Saved models know nothing of the patch, so the loaded one is patched if the saved one was."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, torch_dtype=model.dtype).to(DEVICE).eval()
    patched = any(generated.origin_of(type(m)) for m in model.modules())
    return patch_model(loaded) if patched else loaded


def _state_dict(model: Any, folder: Path) -> Any:
    other = copy.deepcopy(model)
    torch.save(model.state_dict(), folder / "state.pt")
    other.load_state_dict(torch.load(folder / "state.pt"), strict=True)
    return other


def _convert(dtype: torch.dtype) -> Callable[[Any, Path], Any]:
    return lambda model, folder: model.to(dtype)


def _on_the_cpu(family: str) -> nn.Module:
    return load(family).cpu()


def _where_it_is(model: Any, family: str) -> Tensor:
    return tiny.run(model, send_to_device(arguments_of(family), model.device))


def _to_cuda(model: nn.Module, folder: Path) -> nn.Module:
    return model.to("cuda")


FEATURES = (
    Feature("`copy.deepcopy`", _another(lambda model, folder: copy.deepcopy(model)), its_output),
    Feature("`pickle`", _another(_pickle), its_output),
    Feature("`torch.save` of the model", _another(_torch_save), its_output),
    Feature("`save_pretrained`, `from_pretrained`", _another(_save_pretrained), its_output, note="a saved model loads unpatched"),
    Feature("`state_dict`, `load_state_dict`", _another(_state_dict), its_output),
    Feature("`.half()`", _convert(torch.float16), weights_at_rest, run_with=functools.partial(forward, dtype=torch.float16)),
    Feature("`.float()`", _convert(torch.float32), weights_at_rest, run_with=functools.partial(forward, dtype=torch.float32)),
    Feature(
        "`.to(torch.bfloat16)`", _convert(torch.bfloat16), weights_at_rest, families=("Wan",), note="the others have no fp32 parameters"
    ),
    Feature('`.to("cuda")`', _to_cuda, weights_at_rest, nn.Module.cpu, run=_where_it_is, load=_on_the_cpu, gpus=1),
)
