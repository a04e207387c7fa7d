"""Changes of a patched model, and the same of one that was never patched."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ditnorm.patching import patch_model, report, unpatch_model
from support import tiny
from support.patched import DTYPE, fused_calls, is_patched, run

FAMILIES = ["wan-t2v", "qwen-image", "flux", "flux2", "hunyuan-video", "sd3.5-medium"]
BLOCK = {name: "blocks.0" if name == "wan-t2v" else "transformer_blocks.0" for name in FAMILIES}
NORM = {"wan-t2v": "norm1", "qwen-image": "img_norm2", "flux": "norm2", "flux2": "norm2", "hunyuan-video": "norm2", "sd3.5-medium": "norm2"}
ATTENTION = {name: "attn1" if name == "wan-t2v" else "attn" for name in FAMILIES}
CALLS = {name: tiny.MODELS[name].total for name in FAMILIES}

Change = Callable[[nn.Module], object]


def block_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(BLOCK[name])


def attention_of(model: nn.Module, name: str) -> nn.Module:
    return block_of(model, name).get_submodule(ATTENTION[name])


def assert_follows(name: str, change: Change, dtype: torch.dtype = DTYPE, matters: bool = True) -> nn.Module:
    """A model changed after patching gives the bits of one that is only changed. Returns it."""
    model, upstream = tiny.load(name, dtype), tiny.load(name, dtype)
    plain = tiny.run(upstream, tiny.inputs(name, 2, dtype))
    change(upstream)
    expected = tiny.run(upstream, tiny.inputs(name, 2, dtype))
    assert not matters or not torch.equal(expected, plain)
    patch_model(model, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model)
    torch.testing.assert_close(tiny.run(model, tiny.inputs(name, 2, dtype)), expected, rtol=0, atol=0)
    return model


def unfused_parts(model: nn.Module) -> dict[str, list[str]]:
    """Reason -> parts, as the report has them."""
    (found,) = report(model).transformers
    return {**found.changed, **found.unfused_attentions, **found.refused}


@contextlib.contextmanager
def replaced(holder: object, name: str, value: object) -> Iterator[None]:
    original = vars(holder)[name]
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, original)


def assert_follows_while(name: str, replacement: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """The same for a change of the whole process. Afterwards the model is as fused as before."""
    model, upstream = tiny.load(name, DTYPE), tiny.load(name, DTYPE)
    plain = run(upstream, name)
    patch_model(model, strict=True)
    with replacement():
        expected = run(upstream, name)
        assert not torch.equal(expected, plain)
        torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)
        assert unfused_parts(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch_model(model)
        assert any("not fused" in str(warning.message) for warning in caught)
        torch.testing.assert_close(run(model, name), expected, rtol=0, atol=0)
    assert fused_calls(lambda: torch.testing.assert_close(run(model, name), plain, rtol=0, atol=0)) == CALLS[name]
    assert not unfused_parts(model)
    assert not is_patched(unpatch_model(model))


def halving(original: Callable[..., object]) -> Callable[..., object]:
    def halved(self: object, *args: object, **kwargs: object) -> object:
        output = original(self, *args, **kwargs)
        return tuple(o if o is None else o * 0.5 for o in output) if isinstance(output, tuple) else output * 0.5

    return halved


class Damped(nn.LayerNorm):
    """A user's norm."""

    def forward(self, x: Tensor, **ignored: object) -> Tensor:
        return super().forward(x) * 0.5
