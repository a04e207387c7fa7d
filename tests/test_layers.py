"""The layers: drop-in norms that take their modulation."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import DEVICE, compiled_only, torch_norms
from torch import Tensor, nn

from ditnorm import functional, layers
from ditnorm.layers import LayerNormScaleShift, RMSNormScaleShift, ScaleResidualIdentity, ScaleResidualNormScaleShift

D = 64
MAKERS = {
    "layer": LayerNormScaleShift,
    "rms": RMSNormScaleShift,
    "residual_layer": ScaleResidualNormScaleShift,
    "residual_rms": lambda *args, **kwargs: ScaleResidualNormScaleShift(*args, norm_type="rms", **kwargs),
}
PLAIN = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "residual_layer": nn.LayerNorm, "residual_rms": nn.RMSNorm}


def randomized(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Any:
    module = module.to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def activations(count: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(2, 5, D, device=DEVICE).to(dtype) for _ in range(count)]


def modulations(count: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return list(torch.randn(2, count * D, device=DEVICE).to(dtype).chunk(count, dim=-1))


@pytest.mark.parametrize("kind", MAKERS)
def test_isinstance_and_state_dict_are_the_norms(kind: str) -> None:
    plain, ours = PLAIN[kind](D), MAKERS[kind](D)
    assert isinstance(ours, PLAIN[kind])
    assert list(ours.state_dict()) == list(plain.state_dict())
    randomized(plain)
    ours.to(DEVICE, torch.bfloat16).load_state_dict(plain.state_dict())
    assert torch.equal(ours.weight, plain.weight)


def test_scale_residual_layers_share_a_base() -> None:
    assert all(isinstance(ScaleResidualNormScaleShift(D, norm_type=kind), ScaleResidualNormScaleShift) for kind in ("layer", "rms"))
    with pytest.raises(ValueError, match="norm_type: expected 'layer' or 'rms', got 'batch'"):
        ScaleResidualNormScaleShift(D, norm_type="batch")


@pytest.mark.parametrize("kind", MAKERS)
def test_constructor_mirrors_torchs(kind: str) -> None:
    ours = type(MAKERS[kind](D))
    theirs = inspect.signature(PLAIN[kind].__init__).parameters
    positional = {n: p.default for n, p in inspect.signature(ours.__init__).parameters.items() if p.kind is not p.KEYWORD_ONLY}
    assert positional == {n: p.default for n, p in theirs.items()}
    made = MAKERS[kind](D, 1e-3, False, dtype=torch.float16)
    assert made.eps == 1e-3
    assert made.weight is None
    assert MAKERS[kind](D, dtype=torch.float16).weight.dtype is torch.float16


def test_layer_norm_without_bias() -> None:
    assert LayerNormScaleShift(D, bias=False).bias is None
    assert ScaleResidualNormScaleShift(D, bias=False).bias is None


@pytest.mark.parametrize("kind", MAKERS)
def test_extra_repr_adds_the_rounding(kind: str) -> None:
    assert MAKERS[kind](D, rounding="eager").extra_repr() == f"{PLAIN[kind](D).extra_repr()}, rounding='eager'"
    assert "rounding='single'" in repr(MAKERS[kind](D))


@pytest.mark.parametrize("kind", MAKERS)
def test_bad_constructor_arguments(kind: str) -> None:
    with pytest.raises(ValueError, match="rounding: expected one of 'single', 'eager', got 'half'"):
        MAKERS[kind](D, rounding="half")
    with pytest.raises(ValueError, match=r"normalized_shape: expected the last dim only, got \[4, 64\]"):
        MAKERS[kind]((4, D))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKERS)
@torch_norms
def test_called_with_x_alone_it_is_the_plain_norm_bit_for_bit(kind: str, dtype: torch.dtype, affine: bool) -> None:
    plain = randomized(PLAIN[kind](D, elementwise_affine=affine), dtype)
    ours = MAKERS[kind](D, elementwise_affine=affine, rounding="eager").to(DEVICE, dtype)
    ours.load_state_dict(plain.state_dict())
    (x,) = activations(1, dtype)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("rounding", ["single", "eager"])
@pytest.mark.parametrize("kind", MAKERS)
def test_forward_is_the_op(kind: str, rounding: str) -> None:
    layer = randomized(MAKERS[kind](D, rounding=rounding))
    norm = "rms" if "rms" in kind else "layer"
    eps = torch.finfo(torch.float32).eps if norm == "rms" else 1e-5
    (residual, x), (gate, scale, shift) = activations(2), modulations(3)
    tables = {f"{name}_table": torch.randn(D, device=DEVICE) for name in ("scale", "shift")}
    options: dict[str, Any] = {"weight": layer.weight, "bias": layer.bias, "norm": norm, "eps": eps, "rounding": rounding}
    with torch.no_grad():
        if "residual" in kind:
            y, r = layer(residual, x, gate=gate, scale=scale, shift=shift, **tables)
            expected = functional.scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **tables, **options)
            assert torch.equal(r, expected[1])
            assert torch.equal(y, expected[0])
        else:
            y = layer(x, scale=scale, shift=shift, **tables)
            assert torch.equal(y, functional.norm_scale_shift(x, scale, shift, **tables, **options))
        rows = torch.randn(2, 2, D, device=DEVICE).bfloat16()
        index = torch.randint(2, (5,), device=DEVICE)
        y = layer(residual, x, scale=rows, index=index)[0] if "residual" in kind else layer(residual, scale=rows, index=index)
        assert y.isfinite().all()


def sources() -> list[tuple[nn.Module, str]]:
    normalization = pytest.importorskip("diffusers.models.normalization")
    return [
        (nn.LayerNorm(D, 1e-3), "layer"),
        (nn.LayerNorm(D, elementwise_affine=False), "layer"),
        (nn.LayerNorm(D, bias=False), "layer"),
        (nn.RMSNorm(D), "rms"),
        (nn.RMSNorm(D, 1e-5, elementwise_affine=False), "rms"),
        (normalization.FP32LayerNorm(D, 1e-6), "fp32_layer"),
        (normalization.FP32LayerNorm(D, elementwise_affine=False), "fp32_layer"),
        (normalization.RMSNorm(D, 1e-5), "rms"),
        (normalization.RMSNorm(D, 1e-5, elementwise_affine=False), "rms"),
        (normalization.RMSNorm(D, 1e-5, bias=True), "rms"),
    ]


@pytest.mark.parametrize("which", range(10))
def test_from_norm_shares_parameters_and_computes_the_same(which: int) -> None:
    module, norm = sources()[which]
    module = randomized(module, torch.float32).eval()
    residual_layer = ScaleResidualNormScaleShift if "layer" in norm else layers.ScaleResidualRMSNormScaleShift
    for cls in (LayerNormScaleShift if "layer" in norm else RMSNormScaleShift, residual_layer):
        layer = cls.from_norm(module, rounding="eager")
        assert layer.weight is getattr(module, "weight", None)
        assert layer.bias is getattr(module, "bias", None)
        assert (layer.norm, layer.rounding, layer.training) == (norm, "eager", False)
        assert layer.state_dict().keys() == module.state_dict().keys()
        for dtype in (torch.float32, torch.bfloat16):
            (x,) = activations(1, dtype)
            if dtype is torch.bfloat16 and type(module) in (nn.LayerNorm, nn.RMSNorm):
                continue  # torch refuses float32 weights with a bfloat16 input
            with torch.no_grad():
                expected = module(x)
                # torch and diffusers round where they like; the values agree to a few ulp of the
                # dtype.
                torch.testing.assert_close(layer(x), expected.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_weight_that_is_no_parameter_of_the_layer_any_more_counts(kind: str) -> None:
    """FSDP, and the replicas of ``DataParallel``, have it as an attribute."""
    layer = randomized(MAKERS[kind](D))
    inputs, (scale, shift) = activations(2 if kind.startswith("residual") else 1), modulations(2)
    expected = layer(*inputs, scale=scale, shift=shift)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    got = layer(*inputs, scale=scale, shift=shift)
    assert all(map(torch.equal, got, expected))


def test_from_norm_refuses_what_it_cannot_equal() -> None:
    normalization = pytest.importorskip("diffusers.models.normalization")

    class Mine(nn.LayerNorm):
        pass

    with pytest.raises(TypeError, match=r"from_norm: expected nn.LayerNorm, nn.RMSNorm, .* got .*Mine"):
        LayerNormScaleShift.from_norm(Mine(D))
    with pytest.raises(TypeError, match=r"from_norm: expected nn.LayerNorm, .* got None$"):
        LayerNormScaleShift.from_norm(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"from_norm: expected nn.LayerNorm, .* got torch.nn.modules.linear.Linear"):
        LayerNormScaleShift.from_norm(nn.Linear(D, D))
    with pytest.raises(TypeError, match=r"diffusers' RMSNorm with a torch.bfloat16 weight rounds before it multiplies"):
        RMSNormScaleShift.from_norm(normalization.RMSNorm(D, 1e-6).bfloat16())
    with pytest.raises(TypeError, match=r"RMSNormScaleShift.from_norm: expected an RMSNorm, got a LayerNorm"):
        RMSNormScaleShift.from_norm(nn.LayerNorm(D))
    with pytest.raises(TypeError, match=r"LayerNormScaleShift.from_norm: expected a LayerNorm, got an RMSNorm"):
        LayerNormScaleShift.from_norm(nn.RMSNorm(D))
    with pytest.raises(ValueError, match=r"normalized_shape: expected the last dim only, got \[4, 64\]"):
        LayerNormScaleShift.from_norm(nn.LayerNorm((4, D)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch_norms
def test_a_hook_sees_the_plain_norm_and_changes_nothing(dtype: torch.dtype) -> None:
    (residual, x), (gate, scale, shift) = activations(2, dtype), modulations(3, dtype)
    k1, k2 = (
        randomized(LayerNormScaleShift(D, rounding="eager"), dtype),
        randomized(ScaleResidualNormScaleShift(D, rounding="eager"), dtype),
    )
    with torch.no_grad():
        expected_y = k1(residual, scale=scale, shift=shift)
        expected_y2, expected_r = k2(residual, x, gate=gate, scale=scale, shift=shift)
        seen: list[tuple[Tensor, Tensor]] = []
        for layer in (k1, k2):
            layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        y = k1(residual, scale=scale, shift=shift)
        y2, r = k2(residual, x, gate=gate, scale=scale, shift=shift)
    assert torch.equal(y, expected_y)
    assert torch.equal(y2, expected_y2)
    assert torch.equal(r, expected_r)
    assert torch.equal(seen[0][0], residual)
    assert torch.equal(seen[0][1], F.layer_norm(residual, (D,), k1.weight, k1.bias, k1.eps))
    assert torch.equal(seen[1][0], expected_r)
    assert torch.equal(seen[1][1], F.layer_norm(expected_r, (D,), k2.weight, k2.bias, k2.eps))


def test_a_hook_may_replace_the_norms_output() -> None:
    layer = LayerNormScaleShift(D, rounding="eager").to(DEVICE)
    (x,), (shift,) = activations(1, torch.float32), modulations(1, torch.float32)
    layer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert torch.equal(layer(x, shift=shift), shift[:, None].expand_as(x))


@pytest.mark.parametrize("name", layers.__all__)
def test_pickles_name_a_layer_by_where_users_import_it(name: str) -> None:
    """So pickles, and lists of classes that ``torch.load`` may make, outlive changes of the files
    inside.
    """
    layer = getattr(layers, name)
    assert pickle.loads(f"cditnorm.layers\n{name}\n.".encode()) is layer
    assert pickle.dumps(layer, 0).startswith(f"cditnorm.layers\n{name}\n".encode())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", MAKERS)
def test_copies_and_pickles_compute_the_same(kind: str, again: Any) -> None:
    layer = randomized(MAKERS[kind](D, rounding="eager"))
    copied = again(layer)
    (x,), (scale,) = activations(1), modulations(1)
    arguments = (x, x) if "residual" in kind else (x,)
    assert type(copied) is type(layer)
    assert copied.extra_repr() == layer.extra_repr()
    assert copied.weight is not layer.weight
    with torch.no_grad():
        for actual, expected in zip(copied(*arguments, scale=scale), layer(*arguments, scale=scale), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_torch_compile(kind: str) -> None:
    layer = randomized(MAKERS[kind](D))
    (x,), (scale,) = activations(1), modulations(1)
    arguments = (x, x) if "residual" in kind else (x,)
    with torch.no_grad():
        expected = layer(*arguments, scale=scale)
        actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(*arguments, scale=scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gradients_reach_parameters_and_modulation() -> None:
    layer = randomized(ScaleResidualNormScaleShift(D), torch.float32)
    (residual, x), (gate, scale, shift) = activations(2, torch.float32), modulations(3, torch.float32)
    leaves = [t.requires_grad_() for t in (residual, x, gate, scale, shift)]
    y, r = layer(residual, x, gate=gate, scale=scale, shift=shift)
    grads = torch.autograd.grad((y * y + r).sum(), [*leaves, *layer.parameters()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize(
    "make", [lambda: ScaleResidualNormScaleShift(D), lambda: ScaleResidualNormScaleShift(D, norm_type="rms"), ScaleResidualIdentity]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_modulation_without_x_is_an_error(make: Any, compiled: bool) -> None:
    layer = make().to(DEVICE)
    (residual,), (gate,) = activations(1), modulations(1)
    call = torch.compile(layer, backend="eager") if compiled else layer
    with torch.no_grad(), pytest.raises(Exception, match="x: missing; with a modulation the layer takes residual and x"):
        call(residual, gate=gate)
    if not isinstance(layer, ScaleResidualIdentity):
        with pytest.raises(TypeError, match="x: missing"):
            layer(residual, scale=gate, shift=gate)
    assert torch.equal(layer(residual, gate=None), layer(residual))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_modulations_may_be_positional_as_those_of_the_ops(kind: str, hooked: bool) -> None:
    layer = randomized(MAKERS[kind](D))
    (residual, x), (gate, scale, shift) = activations(2), modulations(3)
    if hooked:
        layer.register_forward_hook(lambda module, args, output: None)
    with torch.no_grad():
        if "residual" in kind:
            actual, expected = layer(residual, x, gate, scale, shift), layer(residual, x, gate=gate, scale=scale, shift=shift)
        else:
            actual, expected = (layer(x, scale, shift),), (layer(x, scale=scale, shift=shift),)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MAKERS)
def test_layers_and_ops_have_the_default_eps_of_torchs_functions(kind: str, dtype: torch.dtype) -> None:
    layer, norm = MAKERS[kind](D, elementwise_affine=False, rounding="eager"), "rms" if "rms" in kind else "layer"
    x = (torch.randn(2, 5, D, dtype=dtype) * 1e-4).to(DEVICE)  # so small that any other eps shows
    with torch.no_grad():
        expected = functional.norm_scale_shift(x, norm=norm, rounding="eager")
        assert torch.equal(layer(x), expected)
    torch.testing.assert_close(expected, F.rms_norm(x, (D,)) if norm == "rms" else F.layer_norm(x, (D,)))


def test_identity_is_the_residual_alone() -> None:
    layer = ScaleResidualIdentity()
    (residual, x), (gate,) = activations(2), modulations(1)
    assert layer(residual) is residual
    y, r = layer(residual, x, gate=gate)
    assert y is not r  # upstream hands on a copy
    assert torch.equal(y, r)
    assert torch.equal(r, functional.scale_residual(residual, x, gate))
    assert isinstance(layer, nn.Identity)
    assert not layer.state_dict()


@compiled_only
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_x_alone_runs_the_kernel(kind: str) -> None:
    from ditnorm import kernels

    layer = randomized(MAKERS[kind](D, rounding="eager"))
    before = kernels.counts()
    with torch.no_grad():
        layer(*activations(1))
    changed = {key for key, n in kernels.counts().items() if n != before[key]}
    assert [op for op, _ in changed] == ["norm_scale_shift"]
    assert "reference" not in {path for _, path in changed}
