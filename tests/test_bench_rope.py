"""The benchmark of QK normalisation with rotary embedding: its peers, as far as that needs no GPU."""

import dataclasses
import importlib.metadata

import bench_rope
import pytest
import torch
from bench import rope_peers
from bench_rope import RopeCell

from ditnorm.ops import reference_qk

CPU = torch.device("cpu")
CELLS = [
    RopeCell("joint", 5, 2, 64, encoder=3),
    RopeCell("dual", 5, 2, 64, encoder=3, rotary="per_element"),
    RopeCell("single", 8, 2, 64, rotary="per_element", rotated=5),
    RopeCell("across", 5, 2, 64, rotary="per_pair", across=True),
    RopeCell("alone", 5, 2, 64),
]


@pytest.fixture
def inputs(monkeypatch):
    """Makes a cell's inputs, on the CPU."""
    plain = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes, device, **options: plain(*sizes, **options))
    return RopeCell.inputs


def test_missing_peers_are_named(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = rope_peers.found.__wrapped__()
    assert found.available == []
    assert {peer.name for peer in found.missing} == {
        "sglang",
        "sglang in place",
        "sglang CuTe",
        "sglang triton",
        "comfy-kitchen",
    }
    assert all(peer.reason for peer in found.missing)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_peers_tables_rotate_as_the_op(cell, inputs):
    made = inputs(dataclasses.replace(cell, dtype="fp32"))
    x = torch.randn(1, cell.tokens, cell.heads, cell.head_dim, device=CPU)
    expected = x.clone()
    tables = made["rotary"] if isinstance(made["rotary"], tuple) else (made["rotary"], None)
    rotated = reference_qk.token_count(tables[0])
    expected[:, :rotated] = reference_qk.rotate(x[:, :rotated], *tables)

    cos, sin = rope_peers.halves(made["rotary"], cell.tokens, cell.head_dim, CPU)
    assert cos.shape == sin.shape == (cell.tokens, cell.head_dim // 2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(torch.view_as_real(pairs).flatten(3), expected)
    pairs = (rope_peers.matrices(cos, sin) @ x.unflatten(-1, (-1, 2, 1))).flatten(3)
    torch.testing.assert_close(pairs, expected)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_wrong_results_are_rejected_and_eager_rounding_is_not(cell, inputs):
    made = inputs(cell)
    function = bench_rope.unfused(cell)
    exact = bench_rope.expression(cell, function, made, "single")()
    eager = bench_rope.expression(cell, function, made)()
    rope_peers.check(eager, exact)
    wrong = [t.clone() for t in eager]
    wrong[1][0, -1, -1, -2:] *= 1.1
    with pytest.raises(ValueError, match="the key is off by"):
        rope_peers.check(wrong, exact)
    wrong[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the key is off by nan"):
        rope_peers.check(wrong, exact)
    with pytest.raises(ValueError, match="1 results"):
        rope_peers.check(eager[:1], exact)
