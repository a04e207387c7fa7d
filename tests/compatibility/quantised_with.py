"""Features of the other groups on models with quantised weights."""

import dataclasses
import functools
from typing import Any

from diffusers.hooks.group_offloading import ModuleGroup
from support import quantised

from ditnorm.ops.quantization import FLOAT8_ROW, INT8_ROW, Law

from . import caches, compiled, copies, lora, modes, offload, training, user_hooks
from .feature import ORDERS, Feature, Upstream, calls_of
from .offload import group_offload, inside_blocks
from .quantised import FAMILIES_OF, NAN, load

LAWS = (INT8_ROW, FLOAT8_ROW)


def _load(law: Law, family: str) -> Any:
    model = load(family)
    inside = inside_blocks(model)
    return quantised.quantise(model, law, lambda name: name in inside)


_LOAD = {law: functools.partial(_load, law) for law in LAWS}

_NAMES = (
    "both kinds of hooks on every block",
    "accelerate `cpu_offload` (sequential)",
    "accelerate `cpu_offload_with_hook` (model)",
    "layerwise casting, fp8 storage",
    "`FirstBlockCacheConfig`",
    "`MagCacheConfig`",
    "`PyramidAttentionBroadcastConfig`",
    "`add_adapter`",
    "load an adapter from a file",
    "two adapters with weights",
    "hot-swap an adapter",
    "`fuse_lora`",
    "a forward hook on every norm, looking",
    "`torch.inference_mode`",
    "threads that generate at once",
    "`copy.deepcopy`",
    "`pickle`",
    "`torch.save` of the model",
    "`state_dict`, `load_state_dict`",
    "LoRA training steps",
    '`compile_repeated_blocks(fullgraph=True)`, `backend="aot_eager"`',
)
_MODULES = (offload, caches, lora, user_hooks, modes, copies, training, compiled)
_OTHERS = {feature.name: feature for module in _MODULES for feature in module.FEATURES}
_GROUPS = (
    Feature(
        "group offloading, block level",
        group_offload(disk=False, offload_type="block_level", num_blocks_per_group=1),
        calls_of(ModuleGroup, "onload_"),
        note="diffusers writes no weights of torchao to disk",
    ),
    Feature("group offloading, leaf level", group_offload(disk=False, offload_type="leaf_level"), calls_of(ModuleGroup, "onload_")),
)
_FLOAT8 = {
    "`pickle`": Upstream("has no attribute 'dtype'", "PyTorch pickles float8 weights with `torch.save` only"),
    "LoRA training steps": Upstream("derivative for aten::_scaled_mm", "PyTorch has no gradients of float8 products"),
}
_BOTH = {"`fuse_lora`": Upstream("get_apply_tensor_subclass", "diffusers doesn't tell PEFT how to quantise what was merged")}
_INT8 = {
    '`compile_repeated_blocks(fullgraph=True)`, `backend="aot_eager"`': Upstream(
        r"size\(0\) needs to be greater than 16", "on a GPU compiled int8 products need 17 rows", "cuda"
    )
}
_FAILURES = {INT8_ROW: _BOTH | _INT8, FLOAT8_ROW: _BOTH | _FLOAT8}
"""Law -> feature -> how upstream fails, in every family."""


def _with(feature: Feature, law: Law) -> Feature:
    families = tuple(family for family in feature.families if family in FAMILIES_OF[law])
    notes = (feature.note, NAN if law is FLOAT8_ROW else "")
    failure = _FAILURES[law].get(feature.name)
    return dataclasses.replace(
        feature,
        name=f"{feature.name}, {law}",
        load=_LOAD[law],
        families=families,
        fused="any",
        upstream=dict.fromkeys(families, failure) if failure is not None else feature.upstream,
        needs=(*feature.needs, "torchao"),
        law=law,
        slow=frozenset(ORDERS) if feature.compiles else frozenset(),  # make test compiles blocks in the tests of the models
        in_turn=not feature.compiles,
        note="; ".join(filter(None, notes)),
    )


FEATURES = tuple(_with(feature, law) for feature in (*(_OTHERS[name] for name in _NAMES), *_GROUPS) for law in LAWS)
