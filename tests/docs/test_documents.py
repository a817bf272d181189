"""The documents: links lead somewhere, README lists every document, named tests exist, diagrams are drawn."""

import re
from pathlib import Path

import pytest

from tests.processes import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


def links(document: Path) -> list[str]:
    """The targets of a document's links and pictures, without those to other hosts."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if "://" not in link]


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_of_it(document: Path) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_lists_every_document() -> None:
    index = (ROOT / "README.md").read_text().partition("## Documents\n")[2].partition("\n## ")[0]
    assert [document for document in DOCUMENTS[1:] if f"({document.relative_to(ROOT)})" not in index] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    assert {name for name in named if f"def {name}(" not in TESTS} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_of_a_diagram_ends_early(document: Path) -> None:
    """A semicolon ends a statement of Mermaid's, so a text with one is drawn as an error."""
    diagrams = re.findall(r"^```mermaid\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    assert [diagram for diagram in diagrams if ";" in diagram] == []
