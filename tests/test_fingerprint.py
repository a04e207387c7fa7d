"""Fingerprints of upstream functions: blind to layout, sensitive to meaning, the same on every
Python.
"""

import ast
import functools
import textwrap

import pytest

from ditnorm.swapping.fingerprint import digest, fingerprint
from ditnorm.swapping.norm_kinds import norm_kind

FORWARD = """
def forward(self, x, temb=None, *args, **kwargs):
    shift, scale = self.linear(temb).chunk(2, dim=1)
    x = self.norm(x)[:, None] * (1 + scale) + shift
    return x
"""


def _digest(source: str) -> str:
    return digest(ast.parse(textwrap.dedent(source)).body[0])


@pytest.mark.parametrize(
    "same",
    [
        FORWARD.replace("x, temb=None", "x: torch.Tensor, temb: torch.Tensor | None = None").replace("):\n", ") -> torch.Tensor:\n", 1),
        FORWARD.replace("    return x", "    # the result\n    return (x)"),
        FORWARD.replace("    shift, scale", '    """Modulates."""\n    shift, scale'),
        FORWARD.replace("(2, dim=1)", "(\n        2,\n        dim=1,\n    )"),
        FORWARD.replace("    x = self.norm", "    x: torch.Tensor = self.norm"),
        FORWARD.replace("    x = self.norm", "    y: torch.Tensor\n    x = self.norm"),
        textwrap.indent(FORWARD, "    "),
    ],
    ids=["annotations", "comment and parentheses", "docstring", "layout", "annotated assignment", "declaration", "indentation"],
)
def test_layout_and_annotations_do_not_matter(same):
    assert _digest(same) == _digest(FORWARD)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1 + scale", "1 - scale"),
        ("1 + scale", "1.0 + scale"),
        ("1 + scale", "True + scale"),
        ("shift, scale =", "scale, shift ="),
        ("self.norm(", "self.norm2("),
        ("[:, None]", "[None:]"),
        ("temb=None", "temb=0"),
        ("temb=None", "temb"),
        ("x, temb=None", "hidden_states, temb=None"),
        ("*args, ", ""),
        ("dim=1", "1"),
        ("return x", "return x, shift"),
        ("    return x", "    x = x.float()\n    return x"),
    ],
)
def test_meaning_matters(old, new):
    assert old in FORWARD
    assert _digest(FORWARD.replace(old, new)) != _digest(FORWARD)


def test_the_value_is_the_same_on_every_python():
    # Syntax whose trees have gained fields or changed shape between Python 3.10 and 3.14.
    source = """
    @decorate(1)
    def f(a, /, b: int = 2, *c, d=-3.5, **e) -> None:
        with open(a) as g, h:
            x = [i async for i in c if i] if (n := len(c)) else {**e, "k": b"v"}
        try:
            return f"{x!r:>{n}} and {a[1:, ...]}", lambda y: not y
        except (A, B) as error:
            raise C from error
        match a:
            case {"k": [1, *rest]}:
                del rest
    """
    assert _digest(source) == "65c74045d158"


def test_a_wrapper_is_not_taken_for_what_it_wraps():
    def forward(self, x):
        return x

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    assert fingerprint(wrapper) not in (None, fingerprint(forward))


def test_a_function_without_source_has_no_fingerprint():
    namespace: dict[str, object] = {}
    exec("def forward(self, x): return x", namespace)
    assert fingerprint(namespace["forward"]) is None
    assert fingerprint(len) is None
    assert fingerprint(None) is None


def test_the_installed_fp32_layer_norm_is_known():
    from diffusers.models.normalization import FP32LayerNorm

    assert norm_kind(FP32LayerNorm) == "fp32_layer"
