"""docs/guarantees.md: the tests that it names are there."""

import re

from tests.processes import ROOT

TEXT = (ROOT / "docs/guarantees.md").read_text()
FILES = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}


def test_the_tests_that_are_linked_are_where_the_links_say() -> None:
    links = re.findall(r"\[(test_\w+\.py)\]\(\.\./([^)]*)\)", TEXT)
    assert links
    assert {name: path for name, path in links if FILES.get(name) != ROOT / path} == {}


def test_every_test_that_is_named_is_in_the_file_named_before_it() -> None:
    named: dict[str, set[str]] = {}
    of = ""
    for file, name in re.findall(r"(test_\w+\.py)|`(test_\w+)`", TEXT):
        of = file or of
        named.setdefault(of, set()).update([name] if name else [])
    assert len(named) > 20
    missing = {
        f"{file}: {name}"
        for file, names in named.items()
        for name in names
        if not re.search(rf"^(async )?def {name}\(", FILES[file].read_text(), re.MULTILINE)
    }
    assert missing == set()
