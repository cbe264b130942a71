"""Pages are found and lead somewhere: every page is in the index, every link inside the project resolves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = (ROOT / "docs", ROOT / "benchmarks", ROOT / "recipes", ROOT / "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in BESIDE for page in folder.rglob("*.md"))])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links, as GitHub calls them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", shown).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert target.is_relative_to(ROOT), f"{page.name} links to {link}, which is outside the project"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}; headings there: {sorted(anchors(target))}"


def test_the_index_names_every_page_once() -> None:
    index = ROOT / "docs" / "README.md"
    linked = [(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(index))]
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index}
    assert sorted(pages - set(linked)) == [], "add a line to docs/README.md"
    assert len(linked) == len(set(linked)), "a page is listed twice"


def test_the_readme_leads_to_the_index() -> None:
    assert "docs/README.md" in LINK.findall(prose(ROOT / "README.md"))
