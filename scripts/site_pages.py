"""A hook of mkdocs: README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site, from where
they lie. Their links and those to them are turned to where the pages are.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=turned((ROOT / name).read_text())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of docs/ to the pages that lie above it."""
    return markdown if page.file.src_uri in PAGES.values() else turned(markdown, "../")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name functions by the roles of Sphinx, which stand before code here."""
    return re.sub(r":(?:func|mod|class|data):(?=<code>)", "", html)


def turned(markdown: str, above: str = "") -> str:
    """The links of a file at the top of the repository, or of one that calls the top ``above``."""

    def target(link: re.Match[str]) -> str:
        path = link[1]
        if path.removeprefix(above) in PAGES and path.startswith(above):
            return PAGES[path.removeprefix(above)]
        return path if above else path.removeprefix("docs/")

    return _LINK.sub(target, markdown)
