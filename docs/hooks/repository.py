"""Makes pages of Markdown files outside of docs/, and puts sections of them into other pages.

A page has the section of a file where it says so in a comment: `<!-- README.md: Set-up -->`. Links
are written as they lead within the repository, and become links within the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# The places of files in the repository, and those of their pages.
PAGES = {
    "README.md": "index.md",  # which has some of its sections
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "corpora.md",
}
INCLUDED = re.compile(r"^<!-- (\S+\.md): (.+) -->$", re.MULTILINE)
NEEDS = re.compile(r'^(```\w+) needs="[^"]*"$', re.MULTILINE)  # what a block needs to be tested
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Any, *, config: Any, **_: Any) -> None:
    """Adds the files that are pages as a whole."""
    from mkdocs.structure.files import File  # here, because the tests need none of it

    for place, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Puts in sections that a page asks for, takes out notes for tests, makes links the site's."""
    uri = page.file.src_uri
    own = next((place for place, shared in PAGES.items() if shared == uri), f"docs/{uri}")
    markdown = NEEDS.sub(r"\1", markdown)
    text = relinked(markdown, f"docs/{uri}" if own == "README.md" else own, uri)
    return INCLUDED.sub(lambda found: relinked(section(found[1], found[2]), found[1], uri), text)


def section(place: str, title: str) -> str:
    """Returns what stands in a file of the repository between a heading and the next one.

    Raises:
        ValueError: The file has no such heading.
    """
    text = (ROOT / place).read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{place} has no section {title!r}")
    return found[1].strip()


def relinked(text: str, place: str, uri: str) -> str:
    """Rewrites the relative links of a Markdown text.

    Args:
        text: The text.
        place: Where its file is in the repository.
        uri: The page that shows it.
    """

    def link(found: re.Match[str]) -> str:
        if "://" in found[1]:
            return found[1]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found[1]))
        target = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(link, text)
