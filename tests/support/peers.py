"""Benchmarks of other libraries where none of these is installed."""

import importlib.metadata
from collections.abc import Callable, Mapping

import pytest
from bench.libraries import Found


def missing_without_packages(found: Callable[[], Found], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Why ``found``, which is cached, finds no peer where no package is installed: by name."""

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    result: Found = found.__wrapped__()  # type: ignore[attr-defined]
    assert result.available == []
    assert all(result.missing.values())
    return result.missing
