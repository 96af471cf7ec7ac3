"""The chat on a pseudo-terminal, for the tests of several packages."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def chats(write_models: Callable[..., Path], home: Path, **usual: str) -> Iterator[Callable[..., pexpect.spawn]]:
    """Opens chats with bpe_a and spm, which hardly ever end a reply by themselves; `usual` is their environment."""
    models = write_models("bpe_a", "spm", top="[ensemble]\nseed = 1\n[sampling]\ntop_k = 3\nmax_tokens = 8")
    models.write_text(models.read_text().replace("n_ctx = 512", "n_ctx = 2048"))
    with ExitStack() as stack:

        def open_one(*options: str, **env: str) -> pexpect.spawn:
            child = spawn(["chat", "--models", str(models), *options], home, **usual | env)
            stack.callback(child.close, force=True)
            return child

        yield open_one


def ask(child: pexpect.spawn, line: str) -> None:
    """Send a line once the prompt is there: what comes earlier may be lost while the terminal changes its mode."""
    child.expect(PROMPT)
    child.sendline(line)
