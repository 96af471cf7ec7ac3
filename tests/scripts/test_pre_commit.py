"""Before a commit the same is checked as in CI."""

import re

from conftest import ROOT

OF_FILES = {"trailing-whitespace-fixer", "end-of-file-fixer", "check-toml", "check-yaml"}


def test_style_and_types_are_checked_as_in_ci() -> None:
    entries = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    section = (ROOT / ".ci" / "run").read_text().split("echo '== style and types'\n")[1].split("\n\n")[0]
    assert [entry for entry in entries if entry not in OF_FILES] == section.splitlines()
