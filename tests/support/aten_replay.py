"""What ATen's vectorised LayerNorm and RMSNorm compute on CUDA, bit for bit, in plain PyTorch on
any device.

Source: ``vectorized_layer_norm_kernel`` in ATen/native/cuda/layer_norm_kernel.cu, with the
multiply-adds that nvcc contracts. 128 lanes read groups of 4 elements and run Welford over them;
states are combined within warps, then between the four warps. The one difference: here the
reciprocal square root is correctly rounded, and CUDA's ``rsqrtf`` isn't always.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LANES, GROUP, WARPS = 128, 4, 4


class Welford(NamedTuple):
    mean: Tensor
    m2: Tensor
    count: Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond, 2008), so
    that rounding it again to float32 gives the correctly rounded result.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits % 2 == 0), bits + away, bits)
    return odd.view(torch.float64).float()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(mean, variance)`` [N] of the rows of ``x`` [N, D], D a multiple of 4."""
    n, d = x.shape
    state = Welford(*(torch.zeros(n, LANES) for _ in range(3)))
    for group in _groups(x.float().cpu()):
        inside = torch.arange(LANES) < group.shape[1]
        group = torch.nn.functional.pad(group, (0, 0, 0, LANES - group.shape[1]))
        for v in group.unbind(-1):
            delta = v - state.mean
            count = state.count + 1
            mean = fma(delta, 1 / count, state.mean)
            m2 = fma(delta, v - mean, state.m2)
            added = Welford(mean, m2, count)
            state = Welford(*(torch.where(inside, new, old) for new, old in zip(added, state, strict=True)))
    state = Welford(*(t.view(n, WARPS, LANES // WARPS) for t in state))
    while state.mean.shape[-1] > 1:
        state = _combine(*_halves(state))
    state = Welford(*(t.squeeze(-1) for t in state))
    while state.mean.shape[-1] > 1:
        state = _combine(*_halves(state))
    return state.mean[:, 0], state.m2[:, 0] / d


def mean_square(x: Tensor) -> Tensor:
    """The mean of squares [N] of the rows of ``x`` [N, D], D a multiple of 4."""
    n, d = x.shape
    total = torch.zeros(n, LANES)
    for group in _groups(x.float().cpu()):
        width = group.shape[1]
        for v in group.unbind(-1):
            total[:, :width] = fma(v, v, total[:, :width])
    return lane_sum(total) / d


def layer_norm(x: Tensor, shape: object, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``F.layer_norm`` over the last dim, as on CUDA."""
    rows = x.reshape(-1, x.shape[-1]).float()
    mean, variance = moments(rows)
    centred = rows - mean[:, None]
    rstd = reciprocal_root(variance, eps)[:, None]
    if weight is None and bias is not None:
        return fma(rstd, centred, bias.float().expand_as(rows)).to(x.dtype).view(x.shape)
    return _affine(rstd * centred, weight, bias).to(x.dtype).view(x.shape)


def rms_norm(x: Tensor, shape: object, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``F.rms_norm`` over the last dim, as on CUDA."""
    rows = x.reshape(-1, x.shape[-1]).float()
    rstd = reciprocal_root(mean_square(rows), eps)[:, None]
    return _affine(rstd * rows, weight, None).to(x.dtype).view(x.shape)


def norm_backward(dn: Tensor, x: Tensor, weight: Tensor | None, eps: float, *, centred: bool) -> Tensor:
    """The gradient of ``x`` through ``F.layer_norm``, or if not ``centred`` ``F.rms_norm``, over
    the last dim, as ``layer_norm_grad_input_kernel_vectorized`` computes it.
    """
    rows, gradients, d = x.reshape(-1, x.shape[-1]).float(), dn.reshape(-1, x.shape[-1]).float(), x.shape[-1]
    mean, variance = moments(rows) if centred else (torch.zeros(len(rows)), mean_square(rows))
    centre, rstd = rows - mean[:, None], reciprocal_root(variance, eps)[:, None]
    weights = torch.ones(d) if weight is None else weight.float()
    g = gradients * weights
    total, dot = (torch.zeros(len(rows), LANES) for _ in range(2))
    for group, products in zip(_groups(g), _groups(g * centre), strict=True):
        lanes = group.shape[1]
        for term, product in zip(group.unbind(-1), products.unbind(-1), strict=True):
            total[:, :lanes] += term
            dot[:, :lanes] = fma(product, rstd.expand_as(product), dot[:, :lanes])
    s, t = (lane_sum(lanes)[:, None] for lanes in (total, dot))
    result = fma((d * weights).expand_as(rows), gradients, -(centre * rstd * t))
    result = (result - s if centred else result) * (torch.tensor(1.0) / d * rstd)
    return result.to(x.dtype).view(x.shape)


def lane_sum(lanes: Tensor) -> Tensor:
    """The sum [N] of what the lanes [N, 128] have: within warps, then between them."""
    total = lanes.view(len(lanes), WARPS, LANES // WARPS)
    for _ in range(2):
        while total.shape[-1] > 1:
            mine, other = total.chunk(2, dim=-1)
            total = mine + other
        total = total.squeeze(-1) if total.dim() == 3 else total
    return total[:, 0]


def reciprocal_root(variance: Tensor, eps: float) -> Tensor:
    return (variance + torch.tensor(eps, dtype=torch.float32)).double().rsqrt().float()


def _affine(n: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return n
    return weight.float() * n if bias is None else fma(weight.float().expand_as(n), n, bias.float().expand_as(n))


def _groups(x: Tensor) -> tuple[Tensor, ...]:
    """[N, <= 128, 4] for each turn of the lanes over the row."""
    return x.unflatten(1, (-1, GROUP)).split(LANES, dim=1)


def _halves(state: Welford) -> tuple[Welford, Welford]:
    halves = [t.chunk(2, dim=-1) for t in state]
    return Welford(*(mine for mine, _ in halves)), Welford(*(other for _, other in halves))


def _combine(mine: Welford, other: Welford) -> Welford:
    count = other.count + mine.count
    reciprocal = 1 / count
    others, own = other.count * reciprocal, mine.count * reciprocal
    delta = mine.mean - other.mean
    mean = fma(other.mean, others, mine.mean * own)
    m2 = fma(delta * delta * other.count, own, mine.m2 + other.m2)
    empty = count == 0
    return Welford(mean.masked_fill(empty, 0), m2.masked_fill(empty, 0), count)


def mean_of_squares(x: Tensor, lanes: int = 32) -> Tensor:
    """``x.float().pow(2).mean(-1)`` [N] of the rows of ``x`` [N, D], each by so many lanes."""
    n, d = x.shape
    factor = torch.tensor(float(n), dtype=torch.float32) / torch.tensor(float(n * d), dtype=torch.float32)
    return sum_of_rows(x.float().cpu() ** 2, lanes) * factor


def sum_of_rows(terms: Tensor, lanes: int = 32) -> Tensor:
    """``terms.sum(-1)`` [N] of rows [N, D] of float32 (``Reduce.cuh``), each by so many lanes."""
    d = terms.shape[-1]
    if d >= 128 and d % GROUP == 0:
        grouped = torch.nn.functional.pad(terms, (0, -d % (lanes * GROUP))).unflatten(1, (-1, lanes, GROUP))
        sums = [sum_in_order(grouped[..., j].unbind(1)) for j in range(GROUP)]
    else:
        while lanes > d:
            lanes //= 2
        turns = torch.nn.functional.pad(terms, (0, -d % (lanes * GROUP))).unflatten(1, (-1, GROUP, lanes))
        sums = [sum_in_order(turns[:, :, j].unbind(1)) for j in range(GROUP)]
    total = sum_in_order(sums)
    while total.shape[-1] > 1:
        mine, other = total.chunk(2, dim=-1)
        total = mine + other
    return total[:, 0]


def mean_lanes(n: int, d: int) -> int:
    """How many lanes ATen has for each of ``n`` rows of ``d`` elements in that order: more than a
    warp where the rows are few.
    """

    def last_power_of_2(number: int) -> int:
        return min(1 << (number.bit_length() - 1), 512)

    across = last_power_of_2(d // GROUP if d >= 128 and d % GROUP == 0 else d)
    height = min(last_power_of_2(n), 512 // min(across, 32))
    return min(across, 512 // height)


def sum_in_order(terms: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def diffusers_rms_norm(x: Tensor, weight: Tensor | None, eps: float, lanes: int = 32) -> Tensor:
    """Diffusers' ``RMSNorm.forward``, as on CUDA."""
    rows = x.reshape(-1, x.shape[-1])
    n = rows * reciprocal_root(mean_of_squares(rows, lanes), eps)[:, None]
    if weight is None:
        return n.to(x.dtype).view(x.shape)
    return (n.to(weight.dtype) * weight).view(x.shape)


def diffusers_rms_norm_backward(d: Tensor, x: Tensor, weight: Tensor | None, eps: float, dr: Tensor | None = None) -> Tensor:
    """The gradient of ``x`` through diffusers' ``RMSNorm`` in the order of eager autograd on CUDA,
    which adds what comes through its two uses of ``x`` to ``dr`` one after the other.
    """
    rows = x.reshape(-1, x.shape[-1])
    lanes = mean_lanes(*rows.shape)
    dn = (d if weight is None else d * weight).reshape(rows.shape).float()
    rstd = reciprocal_root(mean_of_squares(rows, lanes), eps)[:, None]
    of_square = -0.5 * sum_of_rows(dn * rows.float(), lanes)[:, None] * (rstd * rstd * rstd) * (torch.tensor(1.0) / x.shape[-1])
    direct, squared = ((dn * rstd).to(x.dtype).view(x.shape), (of_square * (2 * rows.float())).to(x.dtype).view(x.shape))
    return (direct if dr is None else dr + direct) + squared


def complex_rotary(x: Tensor, freqs: Tensor) -> Tensor:
    """``apply_rotary_emb_qwen(x, freqs, use_real=False)``, as on CUDA: nvcc contracts the product
    of complex numbers.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (t.unsqueeze(1).expand_as(a) for t in (freqs.real, freqs.imag))
    turned = torch.stack([fma(a, cos, -(b * sin)), fma(a, sin, b * cos)], dim=-1)
    return turned.flatten(3).type_as(x)


def split_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """LTX-2's ``apply_split_rotary_emb`` as on CUDA, of ``x`` [B, S, H, d] and tables [B, S, H, d /
    2]: from PyTorch 2.11 on ``addcmul_`` rounds once.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([fma(-sin, second, first * cos), fma(sin, first, second * cos)], dim=-1).to(x.dtype)
