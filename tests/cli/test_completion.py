"""What Tab completes in a chat."""

from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from me_local.cli.completion import ChatCompleter


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("notes.txt", "my notes.txt", ".hidden", "sub/deep.md", 'odd"name', "bad\x1bname"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("/ret", ["/retry"]),
        ("/s", ["/system", "/set", "/strategy", "/stats", "/save", "/session"]),
        ("//s", []),
        ("hello /s", []),
        ("/weights ", ["/weights small=", "/weights big="]),
        ("/weights small=1,b", ["/weights small=1,big="]),
        ("/strategy c", ["/strategy ce"]),
        ("/preset co", ["/preset code", "/preset cold"]),
        ("/unit ", ["/unit token", "/unit word"]),
        ("/load n", ["/load notes.txt"]),
        ("/save sub/", ["/save sub/deep.md"]),
        ("/export ", ["/export md "]),
        ("/export md s", ["/export md sub/"]),
        ("/load .", ["/load .hidden"]),
        ("/load none/x", []),
        ("/help n", []),
        ("sum up @no", ["sum up @notes.txt"]),
        ("@", ['@"my notes.txt"', "@notes.txt", "@sub/"]),
        ("@~/sub/d", ["@~/sub/deep.md"]),
        ('@"my n', ['@"my notes.txt"']),
        ('@"s', ['@"sub/']),
        ("/edit @no", ["/edit @notes.txt"]),
        ("me@no", []),
        ("@notes.txt and", []),
        ("@\0", []),
    ],
)
def test_lines_that_tab_makes(typed: str, lines: list[str]) -> None:
    found = ChatCompleter(["small", "big"], ["code", "cold"]).get_completions(Document(typed), CompleteEvent())
    assert [typed[: len(typed) + one.start_position] + one.text for one in found] == lines
