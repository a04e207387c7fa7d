"""HunyuanVideo-1.5's mask of pairs, built in the form that attention reads: the same values, and so
the same pictures.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from support import tiny
from torch import Tensor, nn

from ditnorm import patch_model
from ditnorm.fused import pairwise_mask as pairwise_mask_module
from ditnorm.fused.pairwise_mask import BOOL, MaskForm, mask_form, pairwise_mask
from ditnorm.models.hunyuan_video import attention

TEXT = 5
TEXT_MASKS = {
    "valid": [[1] * TEXT],
    "padding": [[0] * TEXT],
    "padding first": [[0, 0, 1, 1, 1]],
    "batch": [[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]],
    "batch of extremes": [[1] * TEXT, [0] * TEXT],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, HEAD_DIM = 2, 16


def upstream(text_mask: Tensor, tokens: int) -> Tensor:
    """``HunyuanVideo15AttnProcessor2_0``'s."""
    mask = F.pad(text_mask, (tokens - text_mask.shape[1], 0), value=True).bool()
    rows = mask.view(len(mask), 1, 1, tokens).repeat(1, 1, tokens, 1)
    return rows & rows.transpose(2, 3)


@pytest.fixture(params=TEXT_MASKS.values(), ids=TEXT_MASKS.keys())
def text_mask(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(request.param)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("tokens", [TEXT, 13, 16, 23])
def test_a_bool_mask_is_upstreams(text_mask: Tensor, tokens: int, kind: torch.dtype) -> None:
    assert torch.equal(pairwise_mask(text_mask.to(kind), tokens, BOOL), upstream(text_mask, tokens))


@pytest.mark.parametrize("invalid", [-torch.inf, -65504.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [TEXT, 13, 16, 23])
def test_an_additive_mask_is_what_attention_makes_of_upstreams(text_mask: Tensor, tokens: int, dtype: torch.dtype, invalid: float) -> None:
    mask = pairwise_mask(text_mask, tokens, (dtype, invalid))
    assert mask.dtype == dtype
    assert torch.equal(mask, torch.where(upstream(text_mask, tokens), 0.0, torch.tensor(invalid, dtype=dtype)))
    # Attention then makes no aligned copy.
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert mask.stride(-1) == 1


@pytest.mark.parametrize("backend", ["default", "math"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [13, 16])
def test_attention_gives_the_same_bits_with_either(text_mask: Tensor, tokens: int, dtype: torch.dtype, backend: str, device: str) -> None:
    text_mask = text_mask.to(device)
    query, key, value = (torch.randn(len(text_mask), tokens, HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(3))
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH) if backend == "math" else contextlib.nullcontext():
        form = mask_form(query, processor())
        mask = pairwise_mask(text_mask, tokens, form)
        expected, output = (_attention(query, key, value, m) for m in (upstream(text_mask, tokens), mask))
    assert form[0] == dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask)


def processor(backend: Any = None, parallel_config: Any = None) -> SimpleNamespace:
    return SimpleNamespace(_attention_backend=backend, _parallel_config=parallel_config)


def test_only_native_attention_is_given_an_additive_mask() -> None:
    query, additive = torch.randn(1, 13, HEADS, HEAD_DIM), (torch.float32, -torch.inf)
    assert mask_form(query, processor()) == additive
    assert mask_form(query, processor(AttentionBackendName.NATIVE)) == additive
    assert mask_form(query, processor(AttentionBackendName._NATIVE_MATH)) == BOOL
    assert mask_form(query, processor(parallel_config=object())) == BOOL
    assert mask_form(query.clone().requires_grad_(), processor()) == BOOL
    with attention_backend("_native_math"):
        assert mask_form(query, processor()) == BOOL
        assert mask_form(query, processor(AttentionBackendName.NATIVE)) == additive
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mask_form(query, processor()) == BOOL


@pytest.mark.parametrize("lowest", [-torch.inf, -65504.0, -1.0])
def test_the_additive_mask_has_what_attention_puts_for_an_invalid_pair(lowest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some releases of PyTorch do for cuDNN; and as none does: the mask stays bool."""
    attention = F.scaled_dot_product_attention

    def converting(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, lowest)
        return attention(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", converting)
    pairwise_mask_module._probed_form.cache_clear()
    form = mask_form(torch.randn(1, 13, HEADS, HEAD_DIM), processor())
    pairwise_mask_module._probed_form.cache_clear()
    assert form == (BOOL if lowest == -1.0 else (torch.float32, lowest))


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_gives_the_same_bits_with_padding_in_either_text(
    dtype: torch.dtype, additive: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = tiny.load("hunyuan-video-1.5", dtype).to(device), tiny.inputs("hunyuan-video-1.5", 2, dtype)
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    arguments["encoder_attention_mask"][0, 3:] = 0
    arguments["encoder_attention_mask_2"][1] = 0
    expected = tiny.run(model, arguments)
    patch_model(model, strict=True)
    made: list[torch.dtype] = []

    def build(text_mask: Tensor, tokens: int, form: MaskForm) -> Tensor:
        made.append(form[0])
        return pairwise_mask(text_mask, tokens, form)

    monkeypatch.setattr(attention, "pairwise_mask", build)
    if not additive:
        monkeypatch.setattr(attention, "mask_form", lambda *args: BOOL)
    torch.testing.assert_close(tiny.run(model, arguments), expected, rtol=0, atol=0, equal_nan=True)
    assert made == [dtype if additive else torch.bool] * 2


def test_it_compiles_as_one_graph(text_mask: Tensor) -> None:
    query, native = torch.randn(len(text_mask), 13, HEADS, HEAD_DIM), processor()

    def mask(text_mask: Tensor, query: Tensor) -> Tensor:
        return pairwise_mask(text_mask, 13, mask_form(query, native))

    made = torch.compile(mask, backend="aot_eager", fullgraph=True)(text_mask, query)
    assert torch.equal(made, torch.where(upstream(text_mask, 13), 0.0, -torch.inf))
    assert all(stride % 8 == 0 for stride in made.stride()[:-1])
