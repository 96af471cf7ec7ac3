"""What the fetching scripts share: pip downloads one file, the cache keeps it, an error is one line.

Knows nothing of what is in the files. pip's own configuration says which package index is asked.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

POLL = 0.1  # seconds


class FetchError(Exception):
    """Something could not be fetched; the message is one line for the user."""


def cache_folder() -> Path:
    """Give the folder that keeps the files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "me-local"


def pip_download(requirement: str, options: list[str], folder: Path, arrived: Callable[[int], None]) -> Path:
    """Have pip download one package; raise ``FetchError`` with pip's own last error.

    `folder` is for pip to work in, and holds the result; `arrived` is told how many bytes are there so far.
    """
    work, log = folder / "pip", folder / "pip.log"
    result = work / "result"
    result.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-input", *options]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(result), requirement]
    # pip downloads into its temporary folder and moves the file at the end: keep that where it can be watched.
    environment = os.environ | {"TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            while running(process):
                arrived(bytes_in(work))
        finally:
            stop(process)
    files = list(result.iterdir())
    if process.returncode != 0 or len(files) != 1:
        raise FetchError(f"pip could not download {requirement}: {last_error(log.read_text())}")
    return files[0]


def running(process: subprocess.Popen[bytes]) -> bool:
    """Wait a moment; say whether the process is still at work."""
    try:
        process.wait(POLL)
    except subprocess.TimeoutExpired:
        return True
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process if it has not ended by itself."""
    if process.poll() is None:
        process.terminate()
        process.wait()


def bytes_in(folder: Path) -> int:
    """Add up the sizes of the files in a folder that another process is writing to."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(parent, file)).st_size
            except FileNotFoundError:  # moved since it was listed
                continue
    return total


def last_error(log: str) -> str:
    """Give the line of pip's output that says most about why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if errors[-1:] == ["Exception:"]:  # a traceback follows, and what happened is its last line
        errors = lines
    reason = (errors or lines or ["pip gave no reason"])[-1]
    if any("Retrying" in line for line in lines):
        reason += " (the connection to the package index failed: is there a network?)"
    return reason


def exit_status(fetch: Callable[[], None]) -> int:
    """Do the work of a script; give its exit status, after a line on stderr where it failed."""
    try:
        fetch()
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was complete is kept, the rest is removed", file=sys.stderr)
        return 130
    return 0
