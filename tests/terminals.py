"""The chat on a pseudo-terminal, for the tests of several packages."""

import os
import sys
from pathlib import Path

import pexpect

ME_LOCAL = Path(sys.executable).with_name("me-local")
PROMPT = r">\x08\x1b\[2C"  # as prompt_toolkit draws "> "


def spawn(arguments: list[str], home: Path, program: str = str(ME_LOCAL), **env: str) -> pexpect.spawn:
    """The command on a pseudo-terminal of its own, with a home of its own."""
    others = {name: value for name, value in os.environ.items() if name != "XDG_STATE_HOME"}
    environment = others | {"TERM": "xterm-256color", "HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1"} | env
    return pexpect.spawn(
        program,
        arguments,
        env=environment,
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
        dimensions=(40, 200),
    )


def ask(child: pexpect.spawn, line: str) -> None:
    """Send a line once the prompt is there: what comes earlier may be lost while the terminal changes its mode."""
    child.expect(PROMPT)
    child.sendline(line)
