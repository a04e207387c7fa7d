"""No link in README, docs/ or their neighbours is dead. `make docs` asks the built site, too."""

import re
from pathlib import Path

import pytest
import site_pages

ROOT = site_pages.ROOT
PAGES = [*(ROOT / name for name in site_pages.PAGES), *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/digits/README.md"]


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Those that a site and GitHub make of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        found = re.match(r"[a-z]+:", link) or (target.exists() and (not anchor or anchor in anchors(target)))
        dead += [] if found else [link]
    assert dead == []


def test_files_that_prose_names_exist():
    """Paths in the form `scripts/x.py`, `docs/y.json`; a changelog also names what is gone."""
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):
        named = set(re.findall(r"`((?:scripts|docs|tests|examples|ditnorm)/[\w./-]+\.\w+)`", page.read_text()))
        assert [path for path in sorted(named) if not (ROOT / path).exists()] == [], page.name


def test_the_site_has_every_page_of_docs():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*site_pages.PAGES.values(), *(page.name for page in (ROOT / "docs").glob("*.md"))])


def test_links_are_turned_to_where_the_pages_of_the_site_are():
    assert site_pages.turned("[a](docs/use.md#x) [b](CONTRIBUTING.md) [c](#y)") == "[a](use.md#x) [b](contributing.md) [c](#y)"
    assert site_pages.turned("[a](../README.md#installing) [b](ops.json)", "../") == "[a](index.md#installing) [b](ops.json)"


def test_every_parity_script_is_on_the_page_of_use():
    page = (ROOT / "docs" / "use.md").read_text()
    scripts = sorted(path.name for path in (ROOT / "scripts").glob("parity_*.py"))
    assert sorted(set(re.findall(r"parity_\w+\.py", page))) == scripts
