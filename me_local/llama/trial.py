"""The first use of a file: a child process tries it, so that nothing that llama.cpp does with it ends this one.

llama.cpp ends its process where an assertion fails, and where its machine code does not suit the processor. So before a
file is used for the first time with this build of llama.cpp, on this processor and with these settings, a child loads
it, writes a prompt by its template, and evaluates 1, 2 and 40 tokens. Of a member that runs elsewhere the file is here
for its vocabulary, and the child writes the prompt alone. Where the child dies, another tries it without llama.cpp's
extra buffers, in which weights are packed anew for some processors. What was found is remembered in the user's cache
folder.
"""

import contextlib
import hashlib
import json
import logging
import math
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

from me_local.arrays import IntArray
from me_local.config import MemberConfig
from me_local.errors import CrashError, MeLocalError, TemplateMemoryError
from me_local.gguf import part_names
from me_local.llama.member import Member
from me_local.llama.weights import (
    Shelf,
    VocabularyFile,
    Weights,
    build_identity,
    checked_file,
    supports_gpu,
)
from me_local.system.files import replace_file
from me_local.system.machine import address_space_used, available_memory, processor_features, processor_identity
from me_local.text.messages import Message
from me_local.text.prompts import PromptWriter
from me_local.text.templates import choose_template

log = logging.getLogger(__name__)

VARIABLE = "ME_LOCAL_NO_CHECK"
"""Where it is set, and not to 0, "no" or the like, files are not tried, unless the program says otherwise."""

_TOKENS = (1, 2, 40)
_TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. 東京 🙂 "
_LEAST_SECONDS = 50.0
_BYTES_PER_SECOND = 10e6  # of a file that is read, and evaluated, very slowly
_REFUSED = 3  # status of a child that raised one of our errors; whoever loads the file next raises it again
_OUT_OF_MEMORY = 4
_BEGUN = b"begun\n"
_EVIDENCE = (signal.SIGSEGV, signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE)
_MOST_REMEMBERED = 1000
_REBUILD = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
_AMX_FLAGS = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_SAYS_WHY = re.compile(r"GGML_ASSERT|what\(\):|fatal error|terminate called|Error: ")
_FOUND = re.compile(r"(SIG[A-Z]+[ -~]{0,400})?")
_CONFIG = TypeAdapter(MemberConfig)


def is_wanted(check: bool | None) -> bool:
    """Whether files are to be tried; None: unless the environment says not to, in the words that click takes."""
    if check is not None:
        return check
    return os.environ.get(VARIABLE, "").strip().lower() in ("", "0", "false", "f", "no", "n", "off")


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
    """Why it does without extra buffers, empty if it uses them; None where nothing was found out. Raises CrashError.

    What kills a child once may have been something else: only what kills two is believed.
    """
    fault = _run(member, extra_buffers=True) and _run(member, extra_buffers=True)
    if not fault:
        return fault
    again = _run(member, extra_buffers=False)
    if again:
        raise CrashError(f'member "{member.name}": {member.path}: llama.cpp ends the process with it: {again}')
    return None if again is None else fault


def _run(member: MemberConfig, *, extra_buffers: bool) -> str | None:
    """By what a child that uses the member ends before its time, empty if it does not; None where it tells nothing.

    Raises CrashError where it does not end, or takes all the memory.
    """
    assert member.path is not None
    limit = _LEAST_SECONDS + member.path.stat().st_size / _BYTES_PER_SECOND
    entry = {
        "extra_buffers": extra_buffers,
        "member": _CONFIG.dump_python(member, mode="json"),
        "seconds": math.ceil(limit) + 5,
    }
    where = f'member "{member.name}": {member.path}: its first prompt and evaluation'
    try:
        child = _child(json.dumps(entry).encode(), limit)
    except subprocess.TimeoutExpired:
        raise CrashError(f"{where} did not end within {limit:.0f} s; --no-check takes it as it is") from None
    except (OSError, ValueError) as error:  # no room for another process
        log.debug("not tried: %s", error)
        return None
    said = child.stderr.decode("utf-8", "replace")
    log.log(logging.INFO if child.returncode else logging.DEBUG, "tried %s: %d %s", member.path, child.returncode, said)
    if not child.stdout.startswith(_BEGUN):  # what was started may not even be Python
        return None
    if child.returncode == _OUT_OF_MEMORY:
        raise CrashError(f"{where} takes more memory than there is; --no-check takes it as it is")
    if child.returncode == 0:
        return ""
    return _ending(child.returncode, said) if -child.returncode in _EVIDENCE else None


def _child(entry: bytes, limit: float) -> "subprocess.CompletedProcess[bytes]":
    """A child that tries what `entry` says, once it has ended. Raises OSError and subprocess.TimeoutExpired."""
    if not sys.executable:
        raise FileNotFoundError("the program runs Python without its executable")
    folders = os.pathsep.join(str(folder) or os.getcwd() for folder in sys.path)
    ours = {"PYTHONPATH": folders, "GGML_NO_BACKTRACE": "1", VARIABLE: "1"}
    theirs = {name: value for name, value in os.environ.items() if name != "PYTHONINSPECT"}
    command = [sys.executable, "-P", "-m", __name__]
    return subprocess.run(command, input=entry, capture_output=True, env=theirs | ours, timeout=limit)


def _ending(status: int, said: str) -> str:
    """In words: the signal, and the line that tells why."""
    name = signal.Signals(-status).name
    if name == "SIGILL":
        return f"SIGILL, an instruction that this processor does not have; build it here: {_REBUILD}"
    return ": ".join(filter(None, [name, _why(said)]))


def _why(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if _SAYS_WHY.search(line)]
    # A terminating C++ exception says its text in the second of its lines.
    line = next((line for line in lines if "what()" in line), lines[0] if lines else "")
    return re.sub(r"\S*/(?=[^/\s]+:\d)", "", line).encode("ascii", "replace").decode()[:300]


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
        with contextlib.suppress(OSError, RuntimeError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, json.dumps(dict(kept)).encode())


def cache_folder() -> Path:
    """Where what can be found out again is kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "me-local"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "me-local"


def _read(path: Path) -> dict[str, str]:
    """What was found, of a file that may have been damaged or written by somebody else."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in entries if isinstance(value, str) and _FOUND.fullmatch(value)}


def _key(member: MemberConfig) -> str:
    """Equal for what would be tried again: files, settings, build and processor."""
    pieces = [Path(name) for name in part_names(str(member.path))]
    template = Path(member.chat_template) if member.chat_template and "/" in member.chat_template else None
    files = [_stamp(path) for path in (*pieces, member.lora, member.tokenizer, template)]
    settings = _CONFIG.dump_python(replace(member, name="-", weight=1.0, system=None), mode="json")
    settings["url"] = bool(member.url)  # the vocabulary is the same wherever the member runs
    for key in ("engine", "api_key_env", "model"):
        del settings[key]
    del settings["sampling"]
    told = json.dumps([files, settings, build_identity(), processor_identity()], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _stamp(path: Path | None) -> list[Any]:
    try:
        status = path.stat() if path else None
    except (OSError, ValueError):
        return []
    if path is None or status is None:
        return []
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _use(member: MemberConfig, *, extra_buffers: bool) -> None:
    """Load the member, write it a prompt and evaluate that. Raises MeLocalError, or ends the process, or never ends."""
    if member.url is not None:
        with closing(VocabularyFile(member)) as file:
            _write_prompt(member, file)
        return
    with closing(Weights(member, extra_buffers=extra_buffers)) as weights, Member(member, weights) as used:
        ids = np.resize(_write_prompt(member, weights), used.n_ctx)
        end = 0
        for count in _TOKENS:
            end = min(end + count, len(ids))
            used.sync(ids[:end])
            used.logits()


def _write_prompt(member: MemberConfig, file: VocabularyFile) -> IntArray:
    template = choose_template(member.chat_template, file.chat_template, file.token_texts)
    return PromptWriter(file.vocabulary, template.render).prompt([Message("user", _TEXT)])


def _main() -> int:
    entry = json.load(sys.stdin)
    if hasattr(signal, "alarm"):
        signal.alarm(entry["seconds"])  # also where whoever started it is gone
    sys.stdout.buffer.write(_BEGUN)
    sys.stdout.flush()
    member = _CONFIG.validate_json(json.dumps(entry["member"]))
    _limit(member)
    try:
        _use(member, extra_buffers=entry["extra_buffers"])
    except (MemoryError, TemplateMemoryError):
        return _OUT_OF_MEMORY
    except MeLocalError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    return 0


def _limit(member: MemberConfig) -> None:
    """Leave no core file behind, and let memory run out here before the system ends whatever it chooses.

    The address space of a process that uses a GPU says nothing of its memory.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        available, used = available_memory(), address_space_used()
        if available is not None and used is not None and not supports_gpu() and member.path:
            most = used + member.path.stat().st_size + available * 3 // 4
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(_main())
