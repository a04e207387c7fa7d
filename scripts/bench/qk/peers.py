"""How other libraries' kernels norm and rotate query and key.

sglang           its fused CUDA kernels, into new tensors: one for both streams and the values
                 (Qwen-Image's), one for query and key
sglang in place  the latter over its own inputs, as its models call it
sglang CuTe      across heads, in place, query and key one after the other: Wan's; it writes this
                 layout in no other way
sglang triton    its fused kernel that rounds where eager PyTorch does, query and key one after the
                 other
comfy-kitchen    its fused kernel, stream by stream, then the concatenations that joint attention
                 needs; across heads, where it has no norm, PyTorch's rms_norm and then its rotation

Each takes the rotary tables in its own form, made before the measurement, as models make them once
a forward. No peer can leave tokens unrotated: those have tables of no rotation, which are read
besides. What works in place has copies of the inputs and norms them again and again: the traffic is
the same, and the norm keeps the values bounded. No peer serves the norm alone.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cell import EPS, Inputs
from ..contestants import Binding, Call, Maker, nothing
from ..libraries import Found, comfy_kitchen, enter, look_for, sglang_module
from .cells import QKCell


@cache
def found() -> Found:
    """The peers that this process can import."""
    return look_for(
        {
            ("sglang", "sglang"): _sglang,
            ("sglang in place", "sglang"): _sglang_in_place,
            ("sglang CuTe", "sglang"): _sglang_cute,
            ("sglang triton", "sglang"): _sglang_triton,
            ("comfy-kitchen", "comfy-kitchen"): _comfy_kitchen,
        }
    )


def _heads(cell: QKCell, inputs: Inputs, *names: str) -> list[Tensor]:
    """[1, S, H, d]"""
    return [inputs[name].unflatten(-1, (-1, cell.head_dim)) for name in names]


def halves(rotary: Any, tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(cos, sin)`` of each pair, [S, d / 2] float32; of no rotation for the tokens that
    ``rotary`` leaves out.
    """
    half = head_dim // 2
    if rotary is None:
        cos, sin = torch.empty(2, 0, half, device=device)
    elif isinstance(rotary, tuple):
        cos, sin = (t.flatten(0, -2)[:, :: t.shape[-1] // half] for t in rotary)
    else:
        cos, sin = rotary.real, rotary.imag
    none = torch.zeros(tokens - len(cos), half, device=device)
    return torch.cat([cos, none + 1]), torch.cat([sin, none])


def _halves(cell: QKCell, inputs: Inputs, prefix: str = "") -> tuple[Tensor, Tensor]:
    tokens = cell.encoder if prefix else cell.tokens
    return halves(inputs[f"{prefix}rotary"], tokens, cell.head_dim, inputs["query"].device)


def _cache(cell: QKCell, inputs: Inputs, prefix: str = "") -> Tensor:
    """sglang's, [S, d]: the cosines of a token, then its sines."""
    return torch.cat(_halves(cell, inputs, prefix), dim=1)


def matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """comfy-kitchen's, [1, S, 1, d / 2, 2, 2]: what each pair is multiplied by."""
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None, :, None]


def _neighbours(cell: QKCell) -> bool:
    """Whether neighbours are rotated, by tables that heads share: what peers have."""
    return cell.rotary is not None and not cell.halves


def _per_head(cell: QKCell) -> bool:
    """Whether sglang's CUDA kernels serve the cell."""
    return _neighbours(cell) and not cell.across and cell.head_dim in (64, 128, 256) and cell.dtype != "fp32"


def _sglang() -> Binding:
    joint = sglang_module("ops.diffusion.rope.qwen_qkv_epilogue_jit").try_fused_qwen_qkv_epilogue
    alone = sglang_module("ops.diffusion.rope.qknorm_rope_jit").fused_qknorm_rope_out_of_place

    def make_alone(cell: QKCell, inputs: Inputs) -> Call:
        query, key = _heads(cell, inputs, "query", "key")
        weights = inputs["query_weight"], inputs["key_weight"]
        tables, positions = _cache(cell, inputs), torch.arange(cell.tokens, device=query.device)

        def call() -> tuple[Tensor, Tensor]:
            q, k = torch.empty_like(query), torch.empty_like(key)
            alone(query[0], key[0], q[0], k[0], *weights, tables, positions, is_neox=False, eps=EPS)
            return q, k

        return call

    def make_joint(cell: QKCell, inputs: Inputs) -> Call:
        # Its second stream, the text, comes first in the result; it treats the two alike.
        streams = [
            *_heads(cell, inputs, "encoder_query", "encoder_key", "encoder_value"),
            *_heads(cell, inputs, "query", "key", "value"),
            *(inputs[f"{prefix}{name}_weight"] for prefix in ("encoder_", "") for name in ("query", "key")),
            _cache(cell, inputs, "encoder_"),
            _cache(cell, inputs),
        ]

        def call() -> Any:
            results = joint(*streams, EPS, EPS)
            if results is None:
                raise ValueError("try_fused_qwen_qkv_epilogue declines these inputs")
            return results

        return call

    def bind(cell: QKCell) -> Maker:
        return partial(make_joint if cell.encoder else make_alone, cell) if _per_head(cell) else nothing

    return bind


def _sglang_in_place() -> Binding:
    alone = sglang_module("ops.diffusion.rope.qknorm_rope_jit").fused_inplace_qknorm_rope

    def make(cell: QKCell, inputs: Inputs) -> Call:
        query, key = (t.clone() for t in _heads(cell, inputs, "query", "key"))
        tables, positions = _cache(cell, inputs), torch.arange(cell.tokens, device=query.device)
        weights = inputs["query_weight"], inputs["key_weight"]

        def call() -> tuple[Tensor, Tensor]:
            alone(query[0], key[0], *weights, tables, positions, is_neox=False, eps=EPS)
            return query, key

        return call

    return lambda cell: partial(make, cell) if _per_head(cell) and not cell.encoder else nothing


def _sglang_cute() -> Binding:
    enter("flashinfer", ("", "norm", "cute_dsl"))  # for one module that the kernel borrows from
    kernels = sglang_module("ops.diffusion.rope.rmsnorm_interleaved_rope_cutedsl")

    def make(cell: QKCell, inputs: Inputs) -> Call | None:
        query, key = (inputs[name].clone() for name in ("query", "key"))
        tables = _cache(cell, inputs)
        pairs = [(query[0], inputs["query_weight"]), (key[0], inputs["key_weight"])]
        if not all(kernels.can_use_fused_rmsnorm_interleaved_rope(x, weight, tables, cell.head_dim) for x, weight in pairs):
            return None

        def call() -> list[Tensor]:
            for x, weight in pairs:
                kernels.fused_rmsnorm_interleaved_rope_(x, weight, tables, EPS, cell.head_dim)
            return [t.unflatten(-1, (-1, cell.head_dim)) for t in (query, key)]

        return call

    return lambda cell: partial(make, cell) if cell.across and _neighbours(cell) and cell.dtype != "fp32" else nothing


def _sglang_triton() -> Binding:
    kernel = sglang_module("ops.diffusion.rope.qknorm_complex_rope_triton").qknorm_complex_rope

    def make(cell: QKCell, inputs: Inputs) -> Call:
        query, key = _heads(cell, inputs, "query", "key")
        table = torch.complex(*_halves(cell, inputs))
        weights = inputs["query_weight"], inputs["key_weight"]
        return lambda: [kernel(x, weight, table, EPS) for x, weight in zip((query, key), weights, strict=True)]

    return lambda cell: partial(make, cell) if _per_head(cell) and not cell.encoder and cell.head_dim == 128 else nothing


def _comfy_kitchen() -> Binding:
    library = comfy_kitchen()

    def stream(cell: QKCell, inputs: Inputs, prefix: str) -> Call:
        query, key = _heads(cell, inputs, f"{prefix}query", f"{prefix}key")
        weights = inputs[f"{prefix}query_weight"], inputs[f"{prefix}key_weight"]
        turns = matrices(*_halves(cell, inputs, prefix))
        if not cell.across:
            return partial(library.rms_rope, query, key, turns, *weights, EPS)

        def call() -> Any:
            width = [cell.heads * cell.head_dim]
            normed = [F.rms_norm(x.flatten(2), width, weight, EPS) for x, weight in zip((query, key), weights, strict=True)]
            return library.apply_rope(*(n.unflatten(-1, (-1, cell.head_dim)) for n in normed), turns)

        return call

    def make(cell: QKCell, inputs: Inputs) -> Call:
        own = stream(cell, inputs, "")
        if not cell.encoder:
            return own
        encoder, values = stream(cell, inputs, "encoder_"), _heads(cell, inputs, "value", "encoder_value")
        return lambda: [torch.cat(list(parts), dim=1) for parts in (*zip(own(), encoder(), strict=True), values)]

    return lambda cell: partial(make, cell) if _neighbours(cell) else nothing
