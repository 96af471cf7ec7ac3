"""What CONTRIBUTING.md names is there, and the changelog has the form that it says."""

import re

from test_readme import ROOT, links, slugs

PAGE = ROOT / "CONTRIBUTING.md"
CHANGELOG = ROOT / "CHANGELOG.md"
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def test_files_that_are_named_are_there() -> None:
    named = re.findall(r"(?:me_local|tests|scripts|docs)/[\w./-]*", PAGE.read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []


def test_links_lead_to_files_and_headings_that_are_there() -> None:
    for link in links(PAGE):
        name, _, anchor = link.partition("#")
        assert (ROOT / name).is_file(), link
        assert not anchor or anchor in slugs(ROOT / name), link


def test_the_changelog_keeps_to_its_form() -> None:
    headings = re.findall(r"^(#+) (.*)$", CHANGELOG.read_text(), re.MULTILINE)
    assert headings[:2] == [("#", "Changelog"), ("##", "[Unreleased]")]
    for level, text in headings[2:]:
        assert text in KINDS if level == "###" else re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", text)
