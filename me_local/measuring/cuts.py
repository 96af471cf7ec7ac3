"""How often two GGUF files cut a text at the same places, by their vocabularies alone.

A child process reads each file, as it may be used for the first time: see `llama.trial`. `python -m` runs the child.
"""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from me_local.config import MemberConfig
from me_local.errors import MeLocalError
from me_local.llama.weights import VocabularyFile
from me_local.measuring.inspection import SAMPLE, boundaries, overlap
from me_local.measuring.proposing import Candidate

_SECONDS = 60


class Cuts:
    """Where vocabularies cut the sample text; each is read once."""

    def __init__(self) -> None:
        self._known: dict[str, set[int] | None] = {}

    def agreement(self, a: Candidate, b: Candidate) -> float | None:
        """How often two candidates do it at the same places; None where one of them cannot be read."""
        if a.facts.vocabulary_id and a.facts.vocabulary_id == b.facts.vocabulary_id:
            return 1.0
        first, second = self._of(a), self._of(b)
        return None if first is None or second is None else overlap(first, second)

    def _of(self, one: Candidate) -> set[int] | None:
        key = one.facts.vocabulary_id or one.name
        if key not in self._known:
            self._known[key] = _read(one.found.entry.files[0])
        return self._known[key]


def _read(path: Path) -> set[int] | None:
    folders = os.pathsep.join(str(folder) or os.getcwd() for folder in sys.path)
    command = [sys.executable, "-P", "-m", __name__, str(path.absolute())]
    environment = os.environ | {"PYTHONPATH": folders, "GGML_NO_BACKTRACE": "1"}
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=_SECONDS
        )
        return set(json.loads(child.stdout)) if child.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _main(path: str) -> int:
    try:
        with closing(VocabularyFile(MemberConfig("model", path=Path(path)))) as file:
            sys.stdout.write(json.dumps(sorted(boundaries(file.vocabulary, SAMPLE))))
    except MeLocalError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
