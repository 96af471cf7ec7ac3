"""The first use of a file: a child process tries it, so that nothing that llama.cpp does with it ends this one.

llama.cpp ends its process where an assertion fails, and where its machine code does not suit the processor. So before a
file is used for the first time with this build of llama.cpp, on this processor and with these settings, a child loads
it, writes a prompt by its template, which may have no end, and evaluates 1, 2 and 40 tokens. Where the child dies,
another tries it without llama.cpp's extra buffers, in which weights are packed anew for some processors. What was found
is remembered in the user's cache folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from me_local.config import MemberConfig
from me_local.errors import CrashError, MeLocalError
from me_local.machine import processor_features, processor_identity
from me_local.member import Member
from me_local.templates import Message, PromptWriter, choose_template
from me_local.weights import Shelf, Weights, build_identity, checked_file

log = logging.getLogger(__name__)

VARIABLE = "ME_LOCAL_NO_CHECK"
"""Where it is set, and not to 0 or to nothing, files are not tried, unless the program says otherwise."""

_TOKENS = (1, 2, 40)
_TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. 東京 🙂 "
_LEAST_SECONDS = 50.0
_BYTES_PER_SECOND = 10e6  # of a file that is read, and evaluated, very slowly
_REFUSED = 3  # status of a child that raised one of our errors; whoever loads the file next raises it again
_MOST_REMEMBERED = 1000
_REBUILD = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
_AMX_FLAGS = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_SAYS_WHY = re.compile(r"GGML_ASSERT|what\(\):|fatal error|terminate called|Error: ")
_CONFIG = TypeAdapter(MemberConfig)


def is_wanted(check: bool | None) -> bool:
    """Whether files are to be tried; None: unless the environment says not to."""
    return os.environ.get(VARIABLE, "0") in ("", "0") if check is None else check


def try_members(members: Sequence[MemberConfig], shelf: Shelf, announce: Callable[[MemberConfig], None]) -> list[str]:
    """Try the files of all members that were not tried before; `announce` is told of each that takes time.

    Files that do without extra buffers are noted on the shelf; what comes back are remarks on these, a line each.
    Raises LoadError where there is no such file, CrashError where it ends its process either way.
    """
    notices = []
    memory = _Memory()
    for member in members:
        path = checked_file(member)
        tried = replace(member, path=path, hf=None)
        key = _key(tried)
        if key not in memory:
            announce(member)
            outcome = _try(tried)
            if outcome is None:
                continue
            memory.note(key, outcome)
        if fault := memory[key]:
            shelf.avoid_extra_buffers(path)
            notices.append(f"{member.name}: {_without_extra_buffers(fault)}")
    return notices


def _try(member: MemberConfig) -> str | None:
    """Why it does without extra buffers, empty if it uses them; None where nothing was found out. Raises CrashError."""
    fault = _run(member, extra_buffers=True)
    if not fault:
        return fault
    again = _run(member, extra_buffers=False)
    if again:
        raise CrashError(f'member "{member.name}": {member.path}: llama.cpp ends the process with it: {again}')
    return None if again is None else fault


def _run(member: MemberConfig, *, extra_buffers: bool) -> str | None:
    """By what a child that uses the member ends before its time, empty if it does not; None where it tells nothing."""
    assert member.path is not None
    entry = {"extra_buffers": extra_buffers, "member": _CONFIG.dump_python(member, mode="json")}
    folders = os.pathsep.join(folder for folder in sys.path if folder)
    environment = os.environ | {"PYTHONPATH": folders, "GGML_NO_BACKTRACE": "1", VARIABLE: "1"}
    limit = _LEAST_SECONDS + member.path.stat().st_size / _BYTES_PER_SECOND
    command = [sys.executable, "-P", "-m", __name__]
    try:
        child = subprocess.run(
            command, input=json.dumps(entry).encode(), capture_output=True, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise CrashError(
            f'member "{member.name}": {member.path}: its first prompt and evaluation did not end within {limit:.0f} s; '
            "--no-check takes it as it is"
        ) from None
    except OSError as error:  # no room for another process, or Python inside another program
        log.debug("not tried: %s", error)
        return None
    said = child.stderr.decode("utf-8", "replace")
    if child.returncode in (0, _REFUSED):
        log.debug("tried %s: status %d", member.path, child.returncode)
        return None if child.returncode else ""
    log.info("a trial of %s ended with %d: %s", member.path, child.returncode, said)
    return _ending(child.returncode, said)


def _ending(status: int, said: str) -> str:
    """In words: the signal or the status, and the line that tells why."""
    if status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
            if name == "SIGILL":
                return f"SIGILL, an instruction that this processor does not have; build it here: {_REBUILD}"
            return ": ".join(filter(None, [name, _why(said)]))
    return ": ".join(filter(None, [f"status {status}", _why(said)]))


def _why(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if _SAYS_WHY.search(line)]
    # A terminating C++ exception says its text in the second of its lines.
    line = next((line for line in lines if "what()" in line), lines[0] if lines else "")
    return re.sub(r"\S*/(?=[^/\s]+:\d)", "", line)[:300]


def _without_extra_buffers(fault: str) -> str:
    flags = f'CFLAGS="{_AMX_FLAGS}" CXXFLAGS="{_AMX_FLAGS}" ' if "amx_tile" in processor_features() else ""
    return (
        f"llama.cpp ends the process ({fault}) where it packs these weights for this processor, so it runs without "
        f"that, somewhat slower; for full speed build it again: {flags}{_REBUILD}"
    )


class _Memory:
    """What was found, by key: why extra buffers are not used, empty where they are."""

    def __init__(self) -> None:
        self._path = cache_folder() / "tried.json"
        self._found = _read(self._path)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> str:
        return self._found[key]

    def note(self, key: str, fault: str) -> None:
        """Remember it, also for later processes where that is possible."""
        self._found[key] = fault
        # Another process may have written meanwhile.
        kept = list((_read(self._path) | self._found).items())[-_MOST_REMEMBERED:]
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False, encoding="utf-8") as file:
                json.dump(dict(kept), file)
            os.replace(file.name, self._path)


def cache_folder() -> Path:
    """Where what can be found out again is kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "me-local"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "me-local"


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _key(member: MemberConfig) -> str:
    """Equal for what would be tried again: files, settings, build and processor."""
    files = [_stamp(path) for path in (member.path, member.lora, member.tokenizer)]
    settings = _CONFIG.dump_python(replace(member, name="-", weight=1.0, system=None), mode="json")
    del settings["sampling"]
    told = json.dumps([files, settings, build_identity(), processor_identity()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _stamp(path: Path | None) -> list[Any]:
    if path is None or not path.exists():
        return []
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _use(member: MemberConfig, *, extra_buffers: bool) -> None:
    """Load the member, write it a prompt and evaluate that. Raises MeLocalError, or ends the process, or never ends."""
    with closing(Weights(member, extra_buffers=extra_buffers)) as weights, Member(member, weights) as used:
        template = choose_template(member.chat_template, weights.chat_template, weights.token_texts)
        prompt = PromptWriter(weights.vocabulary, template.render).prompt([Message("user", _TEXT)])
        ids = np.resize(prompt, used.n_ctx)
        end = 0
        for count in _TOKENS:
            end = min(end + count, len(ids))
            used.sync(ids[:end])
            used.logits()


def _main() -> int:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a death here is no news for whoever collects core files
    entry = json.load(sys.stdin)
    try:
        _use(_CONFIG.validate_json(json.dumps(entry["member"])), extra_buffers=entry["extra_buffers"])
    except MeLocalError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
