"""The README is short, its two command lines can be found, and all links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 150


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def slugs(page: Path) -> set[str]:
    """The anchors that headings of a page get, here and on GitHub."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead, those to other sites left out."""
    text = re.sub(r"`[^`]*`", "", without_code(page.read_text()))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    ("mark", "line"),
    [
        ("main", "pip install -e . && python scripts/fetch_demo_models.py && me-local chat --models models.toml"),
        ("tests", "pip install -e '.[test]' && pytest"),
    ],
)
def test_a_mark_is_followed_by_a_block_of_one_command_line(mark: str, line: str) -> None:
    assert README.read_text().count(f"<!-- run: {mark} -->\n```\n{line}\n```\n") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in slugs(target), link


def test_the_readme_leads_to_every_page() -> None:
    pages = {f"docs/{page.name}" for page in PAGES[1:] if page.name != "index.md"}
    assert pages <= set(links(README))


def test_pages_link_to_nothing_outside_their_folder() -> None:
    """There they would lead nowhere once the pages are built."""
    assert [link for page in PAGES[1:] for link in links(page) if link.startswith("..")] == []
