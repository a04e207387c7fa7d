"""Compares the fused ops with the unfused expression, bit for bit, on the user's own device and for the sites of the user's own model."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, kernels, layers
from ..fused.attention import FusedAttention, QKNorm
from ..fused.gelu import FusedGELU
from ..fused.module import FusedBlock
from ..ops import checks, reference
from ..swapping import generated
from . import qk_verification
from .qk_verification import HeadSite
from .targets import modules_of, targets
from .units import Swap, Unit

# A wrong order of reduction changes about 1 % of the rows of a bf16 LayerNorm, so 4096 rows miss it with probability 0.99 ** 4096.
_BATCH, _TOKENS = 4, 1024


@dataclass(frozen=True)
class Site:
    """What the bits of one fused call depend on. ``weight``, ``bias`` and ``table`` are dtypes, None where there is none."""

    op: str
    width: int
    dtype: torch.dtype
    norm: str = "layer"
    eps: float | None = None
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    table: torch.dtype | None = None
    modulated: bool = True

    def __str__(self) -> str:
        details = [str(self.dtype), f"width {self.width}"]
        details += [f"{name} {dtype}" for name in ("weight", "bias", "table") if (dtype := getattr(self, name)) is not None]
        return f"{self.op} ({', '.join(details)})".replace("torch.", "")


@dataclass(frozen=True)
class Verification:
    """``sites`` were compared on ``device``, ``differing`` of them had other bits; or nothing was compared, for a ``reason``."""

    device: str = ""
    sites: tuple[Site | HeadSite, ...] = ()
    differing: tuple[Site | HeadSite, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"not verified: {self.reason}"
        if self.differing:
            return f"differs on {self.device}, torch {torch.__version__}: {'; '.join(map(str, self.differing))}"
        return f"bit-identical: verified on {self.device}, torch {torch.__version__}"


_identical: dict[tuple[Site | HeadSite, str], bool] = {}
_warned_of: set[tuple[Site | HeadSite, str]] = set()
_own_calls: Counter[tuple[str, str]] = Counter()


def calls() -> Counter[tuple[str, str]]:
    """``kernels.counts()`` without the calls that verification itself made."""
    return Counter(kernels.counts()) - _own_calls


def verify(target: object, *, strict: bool = False) -> dict[str, Verification]:
    """Runs each distinct fused op of a pipeline or model on 4096 random rows against the unfused expression and compares the bits.

    It runs where the model computes, once a process, and never initialises CUDA. Returns the results by component name (``"model"``
    for a model). A difference warns, or under ``strict`` raises ``RuntimeError``. ``TypeError`` and ``ValueError`` as
    :func:`ditnorm.patch_pipeline`.
    """
    found = targets(modules_of(target))
    return {name: verify_units(model, units, strict=strict) for name, (model, units) in found.items()}


def verify_units(model: nn.Module, units: Iterable[Unit], *, strict: bool = False) -> Verification:
    """Compares each distinct site of the ``units`` that aren't refused, once a process and device. Never initialises CUDA.

    A difference warns, or under ``strict`` raises ``RuntimeError``.
    """
    device, dtype = execution_device(model), stream_dtype(model)
    if device.type == "meta":
        return Verification(reason="the weights are on no device")
    if device.type == "cuda" and not torch.cuda.is_initialized():
        return Verification(reason="CUDA is not in use yet")
    if dtype is None:
        return Verification(reason="the model computes in none of float32, float16 and bfloat16")
    sites = tuple(dict.fromkeys(site for unit in units if unit.refusal is None for site in _sites(unit, dtype)))
    if not sites:
        return Verification(reason="nothing can be fused")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    for site in sites:
        if (site, name) not in _identical:
            _identical[site, name] = _compare_counted(site, device)
    result = Verification(name, sites, tuple(site for site in sites if not _identical[site, name]))
    if strict and result.differing:
        raise RuntimeError(f"ditnorm: the fused ops are not bit-identical here: {result}")
    unannounced = {(site, name) for site in result.differing} - _warned_of
    if unannounced:
        _warned_of.update(unannounced)
        warnings.warn(f"ditnorm: the fused ops are not bit-identical here: {result}", RuntimeWarning, stacklevel=4)
    return result


def execution_device(model: nn.Module) -> torch.device:
    """Where the model computes: offloading hooks know better than the weights."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        registry = getattr(module, "_diffusers_hook", None)
        offloading = registry.get_hook("group_offloading") if registry is not None else None
        if offloading is not None:
            device = offloading.config.onload_device
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((p.device for p in model.parameters()), torch.device("meta"))


def stream_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the model's activations. diffusers' ``dtype`` looks past weights kept in fp32, quantised or cast layer by layer."""
    dtype = getattr(model, "dtype", None) or next((p.dtype for p in model.parameters()), None)
    return dtype if dtype in checks.FLOATS else None


def _sites(unit: Unit, dtype: torch.dtype) -> Iterable[Site | HeadSite]:
    norms: list[Any] = [swap.module for swap in unit.swaps if hasattr(swap.module, "normalized_shape")]
    if not norms:
        return  # a part that has no op of ours
    width = norms[0].normalized_shape[-1]
    for swap in unit.swaps:
        if swap.body in (QKNorm, FusedGELU):
            continue  # a part of its attention's call; no op of ours
        if issubclass(swap.body, FusedAttention):
            yield from qk_verification.sites(swap.module, swap.body, dtype)
        elif swap.body is layers.ScaleResidualIdentity:
            yield Site("scale_residual", width, dtype, table=_dtype(swap.table))
        elif not issubclass(swap.body, FusedBlock):
            yield _norm_site(swap, swap.module, dtype)
        elif swap.body.site_count > sum(not issubclass(expected, FusedBlock) for expected in swap.body.sites.values()):
            table = getattr(swap.module, swap.body.table) if swap.body.table is not None else None
            yield Site("scale_residual", width, dtype, table=_dtype(table))


def _norm_site(swap: Swap, module: Any, dtype: torch.dtype) -> Site:
    gated = issubclass(swap.body, layers.ScaleResidualNormScaleShift)
    fused: Any = generated.subclass(swap.body, swap.upstream, "eager")
    return Site(
        "scale_residual_norm_scale_shift" if gated else "norm_scale_shift",
        module.normalized_shape[-1],
        dtype,
        fused.norm,
        module.eps,
        _dtype(module.weight),
        _dtype(getattr(module, "bias", None)),
        _dtype(swap.table),
        swap.modulated,
    )


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _compare_counted(site: Site | HeadSite, device: torch.device) -> bool:
    before = Counter(kernels.counts())
    try:
        with torch.inference_mode():
            return qk_verification.compare(site, device) if isinstance(site, HeadSite) else _compare(site, device)
    finally:
        _own_calls.update(Counter(kernels.counts()) - before)


def _compare(site: Site, device: torch.device) -> bool:
    """Random rows, each with its own mean and scale, modulated by views of one tensor as in a block; residuals with a gate and without."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def rows() -> Tensor:
        spread, mean = random(_BATCH, _TOKENS, 1).exp(), 4 * random(_BATCH, _TOKENS, 1)
        return (random(_BATCH, _TOKENS, site.width) * spread + mean).to(site.dtype)

    def vector(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else random(site.width, dtype=dtype)

    scale, shift, gate = random(_BATCH, 1, 3 * site.width, dtype=site.dtype).chunk(3, dim=-1)
    arguments: dict[str, Any] = {"x": rows(), "index": None, "rounding": "eager"}
    if site.op != "scale_residual":
        eps = layers._DEFAULT_EPS if site.eps is None else site.eps
        arguments |= {"weight": vector(site.weight), "bias": vector(site.bias), "norm": site.norm, "eps": eps}
        arguments |= dict.fromkeys(("scale", "shift", "scale_table", "shift_table"))
        if site.modulated:
            arguments |= {"scale": scale, "shift": shift, "scale_table": vector(site.table), "shift_table": vector(site.table)}
    if site.op == "norm_scale_shift":
        return _same(site.op, arguments)
    arguments["residual"] = rows()
    gates = ({"gate": gate, "gate_table": vector(site.table)}, {"gate": None, "gate_table": None})
    return all(_same(site.op, arguments | gated) for gated in gates)


def _same(op: str, arguments: dict[str, Any]) -> bool:
    return checks.same_bits(getattr(functional, op)(**arguments), getattr(reference, op)(**arguments))
