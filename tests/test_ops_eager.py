"""``rounding="eager"`` equals diffusers' own expressions bit for bit."""

import pytest
import torch
from support import aten_replay
from support import expressions as diffusers
from support.cases import DEVICE, EPS, FLOATS, MODE, Shape, activation, norm_scale_shift, random_call, run, scale_residual_norm_scale_shift
from torch import Tensor

from ditnorm.functional import scale_residual
from ditnorm.ops import reference
from ditnorm.ops.table import OPS

WIDTHS = (20, 48, 64, 1024, 1152, 1536, 1920, 2432, 3072, 4096, 5120, 6144)
HALVES = (torch.bfloat16, torch.float16)
ODD_WIDTHS = () if MODE != "reference" else (1, 3, 7, 50, 127)  # ATen's order on CUDA is known for multiples of 4


def site(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, output of a sub-layer, and modulation [B, 6D]; a wrong order of reduction changes
    about 1 % of bf16 rows: many on CUDA.
    """
    tokens = 2100 if MODE == "cuda" else 16 if width < 1000 else 3
    shape = Shape(2, tokens, width)
    scatter = torch.rand(2, tokens, 1, device=DEVICE) * 3
    residual, x = (activation("contiguous", shape, dtype) * scatter.to(dtype) for _ in range(2))
    return residual, x, (torch.randn(2, 6 * width) * 0.5).to(dtype).to(DEVICE)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS + ODD_WIDTHS)
def test_qwen_image(width: int, dtype: torch.dtype) -> None:
    residual, x, mod = site(width, dtype)
    mod1, mod2 = mod.chunk(2, dim=-1)
    modulated, gate1 = diffusers.qwen_modulate(diffusers.layer_norm(residual, (width,), eps=EPS), mod1)
    hidden_states = residual + gate1 * x
    modulated2, gate2 = diffusers.qwen_modulate(diffusers.layer_norm(hidden_states, (width,), eps=EPS), mod2)
    last = hidden_states + gate2 * x

    (shift_a, scale_a, gate_a), (shift_b, scale_b, gate_b) = mod1.chunk(3, dim=-1), mod2.chunk(3, dim=-1)
    assert torch.equal(norm_scale_shift(residual, scale_a, shift_a, rounding="eager"), modulated)
    y, r = scale_residual_norm_scale_shift(residual, x, gate_a, scale_b, shift_b, rounding="eager")
    assert torch.equal(r, hidden_states)
    assert torch.equal(y, modulated2)
    assert torch.equal(scale_residual(r, x, gate_b, rounding="eager"), last)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 3072])
def test_qwen_image_modulate_index(width: int, dtype: torch.dtype) -> None:
    residual, x, _ = site(width, dtype)
    batch, tokens = x.shape[:2]
    temb = (torch.randn(2 * batch, 3 * width) * 0.5).to(dtype).to(DEVICE)
    index = torch.randint(2, (batch, tokens), device=DEVICE, dtype=torch.int32)
    _, gate = diffusers.qwen_modulate(residual, temb, index)
    hidden_states = residual + gate * x
    modulated, _ = diffusers.qwen_modulate(diffusers.layer_norm(hidden_states, (width,), eps=EPS), temb, index)

    shift_rows, scale_rows, gate_rows = temb.view(2, batch, 3 * width).transpose(0, 1).chunk(3, dim=-1)
    y, r = scale_residual_norm_scale_shift(residual, x, gate_rows, scale_rows, shift_rows, index=index, rounding="eager")
    assert torch.equal(r, hidden_states)
    assert torch.equal(y, modulated)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS[:6])
def test_hunyuan_video(width: int, dtype: torch.dtype) -> None:
    residual, x, emb = site(width, dtype)
    shift, scale, gate, shift_mlp, scale_mlp, _ = emb.chunk(6, dim=1)
    strided = residual.transpose(1, 2).contiguous().transpose(1, 2)  # as flatten(2).transpose(1, 2) of the patch embedding leaves it
    normed = diffusers.hunyuan_ada_layer_norm_zero(strided, scale, shift)
    hidden_states = strided + x * gate.unsqueeze(1)
    normed2 = diffusers.layer_norm(hidden_states, (width,), eps=EPS) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]

    assert torch.equal(norm_scale_shift(strided, scale, shift, rounding="eager"), normed)
    y, r = scale_residual_norm_scale_shift(strided, x, gate, scale_mlp, shift_mlp, rounding="eager")
    assert torch.equal(r, hidden_states)
    assert torch.equal(y, normed2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [20, 3072])
def test_hunyuan_video_token_replace(width: int, dtype: torch.dtype) -> None:
    residual, _, emb = site(width, dtype)
    replaced = torch.randn_like(emb) * 0.5
    tokens, first = residual.shape[1], residual.shape[1] // 3
    normed = diffusers.hunyuan_token_replace_norm(residual, emb, replaced, first)

    shift, scale = (torch.stack([a, b], dim=1) for a, b in zip(replaced.chunk(6, 1)[:2], emb.chunk(6, 1)[:2], strict=True))
    index = torch.arange(tokens, device=DEVICE) >= first
    assert torch.equal(norm_scale_shift(residual, scale, shift, index=index, rounding="eager"), normed)


@pytest.mark.sanitize
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS + ODD_WIDTHS)
def test_wan(width: int, dtype: torch.dtype, per_token: bool) -> None:
    hidden_states, x, _ = site(width, dtype)
    batch, tokens = x.shape[:2]
    tokens = tokens if width < 2048 else min(tokens, 1100)  # the float32 sum that the fused op avoids takes memory
    hidden_states, x = hidden_states[:, :tokens].contiguous(), x[:, :tokens].contiguous()
    table = torch.randn(1, 6, width, device=DEVICE) / width**0.5
    temb = (torch.randn(batch, *((tokens,) if per_token else ()), 6, width) * 0.5).to(dtype).to(DEVICE)
    weight, bias = (torch.randn(2, width, device=DEVICE) * 0.5 + 1).unbind(0)
    shift1, scale1, gate1, _, _, gate3 = diffusers.wan_modulation(table, temb)
    y1 = diffusers.wan_norm(hidden_states, scale1, shift1)
    r1 = diffusers.wan_residual(hidden_states, x, gate1)
    y2 = diffusers.wan_affine_norm(r1, weight, bias)
    r2 = r1 + x
    r3 = (r2.float() + x.float() * gate3).type_as(r2)

    rows = temb.unbind(-2)
    shift_row, scale_row, gate_row, _, _, gate3_row = table[0].unbind(0)
    options = {"scale_table": scale_row, "shift_table": shift_row, "norm": "fp32_layer", "rounding": "eager"}
    assert torch.equal(norm_scale_shift(hidden_states, rows[1], rows[0], **options), y1)
    affine = {"weight": weight, "bias": bias, "norm": "fp32_layer", "rounding": "eager"}
    y, r = scale_residual_norm_scale_shift(hidden_states, x, rows[2], gate_table=gate_row, **affine)
    assert torch.equal(r, r1)
    assert torch.equal(y, y2)
    y, r = scale_residual_norm_scale_shift(r1, x, None, rows[1], rows[0], **options)
    assert torch.equal(r, r2)
    assert torch.equal(y, diffusers.wan_norm(r2, scale1, shift1))
    y, r = scale_residual_norm_scale_shift(hidden_states, x, rows[2], rows[1], rows[0], gate_table=gate_row, **options)
    assert torch.equal(r, r1)
    assert torch.equal(y, diffusers.wan_norm(r1, scale1, shift1))
    assert torch.equal(scale_residual(r2, x, rows[5], gate_table=gate3_row, rounding="eager"), r3)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", WIDTHS + ODD_WIDTHS)
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, other, mod = site(width, dtype)
    scale, shift, gate = (m[:, None] for m in mod.chunk(6, dim=-1)[:3])
    weight = torch.randn(width, device=DEVICE).to(dtype)
    assert torch.equal(norm_scale_shift(x, scale, shift, norm="rms", rounding="eager"), diffusers.ltx_norm(x, scale, shift))
    y, r = scale_residual_norm_scale_shift(x, other, gate, weight=weight, norm="rms", rounding="eager")
    hidden_states = x + gate * other
    assert torch.equal(r, hidden_states)
    assert torch.equal(y, diffusers.rms_norm(hidden_states, (width,), weight, EPS))


@pytest.mark.parametrize("affine", ["weight", "bias", "both"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [48, 1152, 1920, 3072])
def test_affine_layer_norm_in_the_dtype_of_x(width: int, dtype: torch.dtype, affine: str) -> None:
    if affine == "bias" and DEVICE == "cuda":
        pytest.skip("not promised on CUDA: no norm module has a bias without a weight")
    x, other, mod = site(width, dtype)
    shift, scale, gate = mod.chunk(6, dim=-1)[:3]
    weight, bias = torch.randn(2, width, device=DEVICE).to(dtype).unbind(0)
    pair = (None if affine == "bias" else weight, None if affine == "weight" else bias)
    hidden_states = other + gate[:, None] * x
    options = {"weight": pair[0], "bias": pair[1], "eps": 1e-5, "rounding": "eager"}

    expected = diffusers.layer_norm(x, (width,), *pair, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    assert torch.equal(norm_scale_shift(x, scale, shift, **options), expected)
    assert torch.equal(norm_scale_shift(x, **options), diffusers.layer_norm(x, (width,), *pair, 1e-5))
    y, r = scale_residual_norm_scale_shift(other, x, gate, scale, shift, **options)
    expected = diffusers.layer_norm(hidden_states, (width,), *pair, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    assert torch.equal(r, hidden_states)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [64, 1152])
def test_fp32_layer_norm_rounds_before_a_half_precision_modulation(width: int, dtype: torch.dtype, affine: bool) -> None:
    # AuraFlow, JoyImage: FP32LayerNorm returns the dtype of x, and the modulation goes on in that.
    x, _, mod = site(width, dtype)
    shift, scale = mod.chunk(6, dim=-1)[:2]
    weight, bias = torch.randn(2, width, device=DEVICE).unbind(0) if affine else (None, None)
    normed = diffusers.layer_norm(x.float(), (width,), weight, bias, EPS).to(dtype)
    y = norm_scale_shift(x, scale, shift, weight=weight, bias=bias, norm="fp32_layer", rounding="eager")
    assert torch.equal(y, normed * (1 + scale[:, None]) + shift[:, None])


@pytest.mark.parametrize("width", [64, 1536])
def test_a_table_sums_in_float32_and_widens_the_whole_law(width: int) -> None:
    # With one L for a call, a table for scale alone makes the bf16 shift join in float32 too.
    x, _, mod = site(width, torch.bfloat16)
    shift, scale = mod.chunk(6, dim=-1)[:2]
    table = torch.randn(width, device=DEVICE)
    y = norm_scale_shift(x, scale, shift, scale_table=table, rounding="eager")
    assert torch.equal(y, diffusers.wan_norm(x, (scale.float() + table)[:, None], shift.float()[:, None]))


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", HALVES)
def test_scale_or_shift_alone(dtype: torch.dtype, norm: str) -> None:
    x, _, mod = site(1024, dtype)
    shift, scale = (m[:, None] for m in mod.chunk(6, dim=-1)[:2])
    n = diffusers.rms_norm(x, (1024,), None, EPS) if norm == "rms" else diffusers.layer_norm(x, (1024,), eps=EPS)
    assert torch.equal(norm_scale_shift(x, scale, norm=norm, rounding="eager"), n * (1 + scale))
    assert torch.equal(norm_scale_shift(x, None, shift, norm=norm, rounding="eager"), n + shift)
    assert torch.equal(norm_scale_shift(x, norm=norm, rounding="eager"), n)


@pytest.mark.skipif(MODE != "cpu_sim", reason="compares the host build with the reference; elsewhere the tests above do")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [20, 64, 520, 1152, 3072])
@pytest.mark.parametrize("op", ["norm_scale_shift", "scale_residual_norm_scale_shift", "scale_residual"])
def test_random_arguments_equal_the_reference_over_cudas_norms(op: str, width: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call(op, width, seed, "eager")
    if any(t.data_ptr() % 16 or t.stride(-1) != 1 for name, t in call.items() if name in ("x", "residual")):
        call |= {name: call[name].clone() for name in ("x", "residual") if name in call}
    monkeypatch.setattr(reference.F, "layer_norm", aten_replay.layer_norm)
    monkeypatch.setattr(reference.F, "rms_norm", aten_replay.rms_norm)
    flat = _flat(op, call)
    expected = OPS[op].expression(*flat)
    y, r = run(op, call)
    pairs = zip((y, r) if y is not None and r is not None else (y if r is None else r,), _tuple(expected), strict=True)
    for result, wanted in pairs:
        assert result is not None
        assert torch.equal(result, wanted)


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _flat(op: str, call: dict[str, object]) -> list[object]:
    """The arguments in the order of the reference functions."""
    residual = ["residual"] if op != "norm_scale_shift" else []
    modulations = ["gate"] if op == "scale_residual" else ["scale", "shift"] if op == "norm_scale_shift" else ["gate", "scale", "shift"]
    affine, norm = ([], []) if op == "scale_residual" else (["weight", "bias"], ["norm", "eps"])
    tables = [f"{name}_table" for name in modulations]
    return [call.get(name) for name in [*residual, "x", *modulations, *affine, *tables, "index", *norm, "rounding"]]


@pytest.mark.parametrize("width", [4, 20, 64, 512, 1152, 3072])
def test_the_replay_of_atens_order_is_a_layer_norm(width: int) -> None:
    x = (torch.randn(16, width) * torch.rand(16, 1) * 4 + torch.randn(16, 1) * 3).float()
    mean, variance = aten_replay.moments(x)
    largest = x.abs().amax(-1).double()
    chain = width / 128 + 16
    exact_variance = x.double().var(-1, correction=0)
    condition = (1 + x.double().mean(-1).square() / exact_variance).sqrt()
    assert ((mean - x.double().mean(-1)).abs() <= chain * 2.0**-24 * largest).all()
    assert ((variance / exact_variance - 1).abs() <= chain * 2.0**-24 * condition * 2).all()
    assert ((aten_replay.mean_square(x) / x.double().square().mean(-1) - 1).abs() <= chain * 2.0**-24).all()


def test_the_replays_fma_rounds_once() -> None:
    a, b = (torch.randn(100_000) for _ in range(2))
    c = -(a * b) * (1 + torch.randint(-3, 4, a.shape) * 2.0**-12)
    from fractions import Fraction

    fused = aten_replay.fma(a, b, c)
    for i in range(0, len(a), 500):
        true = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        step = Fraction(torch.nextafter(fused[i].abs(), torch.tensor(float("inf"))).item()) - abs(Fraction(fused[i].item()))
        assert abs(Fraction(fused[i].item()) - true) <= step / 2
