"""Row numbers: what a look-up on the device finds."""

import torch
from torch import Tensor

from ditnorm.fused.modulation.rows import RowNumbers, key_of


def given(numbers: RowNumbers, *embeddings: Tensor) -> list[Tensor]:
    """The rows that each gets, the first being in use."""
    keys = [key_of(embedding) for embedding in embeddings]
    assert numbers.find(keys[0]) is None
    entries = numbers.planned(keys)
    numbers.add(entries, embeddings)
    return [entry.tensor(embeddings[0].device) for entry in entries.values()]


def test_a_look_up_on_the_device_finds_what_had_rows_before_the_table_grew(device: str) -> None:
    numbers = RowNumbers(2)
    first, others = torch.randn(2, 8, device=device), [torch.randn(2, 8, device=device) for _ in range(3)]
    (rows,) = given(numbers, first)
    more = given(numbers, *others)
    assert numbers.capacity > 2
    for embedding, expected in zip([first, *others], [rows, *more], strict=True):
        assert torch.equal(numbers.find_on_device(embedding), expected)


def test_a_look_up_on_the_device_finds_embeddings_of_two_dtypes(device: str) -> None:
    numbers = RowNumbers(8)
    embedding = torch.randn(2, 8, device=device)
    rows, halves = given(numbers, embedding), given(numbers, embedding.half())
    assert torch.equal(numbers.find_on_device(embedding), rows[0])
    assert torch.equal(numbers.find_on_device(embedding.half()), halves[0])
    assert not torch.equal(*rows, *halves)


def test_a_look_up_on_the_device_does_not_find_rows_that_were_taken_back(device: str) -> None:
    numbers = RowNumbers(8)
    embedding = torch.randn(2, 8, device=device)
    given(numbers, embedding)
    numbers.clear()
    assert numbers.find_on_device(embedding).tolist() == [8, 8]
