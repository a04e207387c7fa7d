"""diffusers' ``FeedForward`` with quantised weights. Its first layer may be given its input
quantised already, and GELU's result is quantised for the last layer in the same pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import gelu_quantize, quantize
from ..ops.quantization import FLOAT8_CAPABILITY, FLOAT8_ROW_BFL, Law, Quantized, Wanted
from ..swapping.torch_private import traced_as
from .activation_sites import Activation
from .bfl_linear import quantized_body
from .gelu import FusedGELU, unlike_torchs
from .laws import hooked, law_for, no_law
from .module import FusedModule, upstream_of
from .quantized_linear import QuantizedLinear


class FeedForwardBody(FusedModule):
    """A feed-forward module that may be handed what it reads quantised."""

    @classmethod
    def applies_to(cls, module: nn.Module) -> bool:
        """Whether the body is for ``module``, and something in that is quantised."""
        return super().applies_to(module) and any(quantized_body(m) is not None for m in module.modules())

    def law(self, x: Tensor) -> Wanted | None:
        """The law by which its first layer quantises what the module is given with the shape and
        dtype of ``x``; None: as it is.
        """
        raise NotImplementedError


class FusedFeedForward(FeedForwardBody):
    """hidden_states [..., D], or what it was quantised to -> [..., D]."""

    fingerprints = {"forward": frozenset({"5d1675303cd4"})}  # 0.37.0 to 0.42.1

    optional = True

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        gelu, *_, linear = module.net
        body = quantized_body(linear)
        if (
            body is not None
            and body.unsupported(linear) is None
            and FusedGELU.knows(upstream_of(type(gelu)))
            and gelu.approximate == "tanh"
            and unlike_torchs() is None
        ):
            yield Activation("net.0", "GELU and its quantiser in one call")

    def traced_forward(self, hidden_states: Tensor | Quantized, *args: Any, **kwargs: Any) -> Tensor:
        """``forward``, as Dynamo traces it: upstream's, which has the same layers called."""
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    @traced_as(traced_forward)
    def forward(self, hidden_states: Tensor | Quantized, *args: Any, **kwargs: Any) -> Tensor:
        layers = list(self._modules["net"]._modules.values())
        if args or kwargs or not self.intact() or len(layers) != 3 or not _quantises(*layers):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        gelu, _, linear = layers
        inner = gelu._modules["proj"](hidden_states)
        law = law_for(inner, linear)
        if isinstance(law, Law) and _kernels_gelu_is_atens(inner):
            return linear(gelu_quantize(inner, law))
        inner = gelu.activate(inner)
        return linear(quantize(inner, law) if isinstance(law, Law) else inner)

    def law(self, x: Tensor) -> Wanted | None:
        if hooked(self):
            return None
        gelu: Any = self._modules["net"]._modules.get("0")
        return law_for(x, gelu._modules["proj"]) if isinstance(gelu, FusedGELU) and not hooked(gelu) else None


@traced_as(no_law)
def law_in_feed_forward(module: Any, x: Tensor) -> Wanted | None:
    """:meth:`FeedForwardBody.law` of a module that may be unfused."""
    return module.law(x) if isinstance(module, FeedForwardBody) else None


def _quantises(gelu: nn.Module, dropout: nn.Module, linear: nn.Module) -> bool:
    """Whether GELU's result may go to ``linear`` quantised: nobody looks at it, and the dropout
    between them drops nothing.
    """
    return (
        isinstance(linear, QuantizedLinear)
        and isinstance(gelu, FusedGELU)
        and gelu.approximate == "tanh"
        and gelu.is_torchs()
        and not hooked(gelu)
        and type(dropout) is nn.Dropout
        and (dropout.p == 0 or not dropout.training)
        and not hooked(dropout)
    )


_known: dict[tuple[torch.device, torch.dtype], bool] = {}


def _kernels_gelu_is_atens(x: Tensor) -> bool:
    """Whether the GELU of the kernel that quantises it has PyTorch's bits for every number of the
    dtype of ``x``, where ``x`` is. Compared once a process, see
    :func:`ditnorm.fused.activation_sites.served`.
    """
    key = x.device, x.dtype
    if key not in _known:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        _known[key] = _compared(*key)
    return _known[key]


def _compared(device: torch.device, dtype: torch.dtype) -> bool:
    """Compares what each number is quantised to, in a row of its own, whose scale in float32 shows
    its GELU. False where there is no float8 to compare by.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        return False
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)[:, None].repeat(1, 8)
    ours, expected = gelu_quantize(every, FLOAT8_ROW_BFL), quantize(F.gelu(every, approximate="tanh"), FLOAT8_ROW_BFL)
    pairs = ((a.float().nan_to_num(-1.0), b.float().nan_to_num(-1.0)) for a, b in zip(ours[:2], expected[:2], strict=True))
    return all(torch.equal(a, b) for a, b in pairs)
