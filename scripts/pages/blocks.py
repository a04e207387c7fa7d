"""Parts of a page that a script writes, between two comments in Markdown."""

import re
from collections.abc import Mapping

_BLOCK = re.compile(r"(<!-- written by scripts/results_page\.py: (?P<name>[\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)", re.DOTALL)


def names(page: str) -> list[str]:
    """The blocks of a page."""
    return [found["name"] for found in _BLOCK.finditer(page)]


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """``page`` with each block's text; ``KeyError`` for a block that nothing writes."""
    return _BLOCK.sub(lambda found: found[1] + blocks[found["name"]].strip("\n") + "\n" + found[3], page)


def without(page: str) -> str:
    """What a person wrote."""
    return _BLOCK.sub("", page)


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table in Markdown, all columns but the ``left`` first ones right-aligned."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
