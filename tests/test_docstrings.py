"""The docstrings of the public names say all that a caller needs, and their examples run."""

import doctest
import inspect
import re

import diffusers
import pytest
import torch
import torch.nn.functional as F
from support import tiny

import ditnorm
from ditnorm import functional

MORE = ("norm_scale_residual", "norm_scale_residual_norm_scale_shift", "gelu", "swiglu")
NAMES = {name: getattr(ditnorm, name) for name in ditnorm.__all__ if name != "__version__"}
NAMES |= {f"functional.{name}": getattr(functional, name) for name in MORE}


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_result_and_error_is_documented(name):
    public = NAMES[name]
    text = inspect.getdoc(public) or ""
    sections = ["Args:", *([] if inspect.isclass(public) else ["Returns:"]), "Raises:", "Examples:"]
    places = [text.find(f"\n{section}\n") for section in sections]
    assert -1 not in places
    assert places == sorted(places)
    arguments = text[places[0] : places[1]]
    parameters = inspect.signature(public).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert named == re.findall(r"^    (\w+):", arguments, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    model = tiny.load("flux", torch.float32)
    known = {
        "F": F,
        "diffusers": diffusers,
        "ditnorm": ditnorm,
        "functional": functional,
        "inputs": tiny.inputs("flux", 1, torch.float32, 0),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "torch": torch,
        "transformer": model,
        "vae": None,
    }
    (example,) = doctest.DocTestFinder(recurse=False).find(NAMES[name], name, globs=known)
    assert example.examples
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
    assert not [m for m in model.modules() if type(m).__module__.startswith("ditnorm")], "an example leaves the model patched"
