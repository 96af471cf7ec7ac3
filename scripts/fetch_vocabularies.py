"""Fetch the real vocabularies and chat templates of llama.cpp's own tests, out of the source of llama-cpp-python.

Contract: afterwards ``folder()`` holds every ggml-vocab-*.gguf of the source of the installed version, and beside
most of them two files with texts and the ids that the model's own tokenizer gives them (.inp, .out); their paths are
printed. Its folder ``templates`` holds the chat templates of known models (.jinja). Or the script has said in one
line on stderr what went wrong and exits with status 1 (130 after Ctrl-C). A file appears there only once it is whole;
`sizes.json`, written last, says what belongs there, so a damaged folder is noticed and fetched again. pip downloads
the source, and for its name and version alone pip also gets the tools that would build it; nothing is built or
installed.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from pip_downloads import FetchError, cache_folder, exit_status, pip_download
from rich.console import Console

PACKAGE = "llama-cpp-python"
WANTED = re.compile(r"[^/]+/vendor/llama\.cpp/models/(ggml-vocab-[^/]+\.gguf(\.inp|\.out)?|templates/[^/]+\.jinja)")
KINDS = {".gguf": "vocabularies (ggml-vocab-*.gguf)", ".jinja": "chat templates (templates/*.jinja)"}

# Puts the source of a requirement into the folder and gives its path.
Download = Callable[[str, Path], Path]


def download_source(requirement: str, folder: Path) -> Path:
    """Have pip download the source; it comes from pip's own cache where pip has built the package from it."""
    return pip_download(requirement, ["--no-binary", PACKAGE], folder, lambda _: None)


def folder() -> Path:
    """Give the folder that keeps the vocabularies of the installed version."""
    return cache_folder() / "vocabularies" / version(PACKAGE)


def kept(place: Path, kind: str = ".gguf") -> list[Path]:
    """Give the files of a kind in `place`, sorted: the vocabularies; none where any file is missing or damaged."""
    try:
        sizes = json.loads((place / "sizes.json").read_text())
        whole = all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return []
    whole = whole and not missing(sizes)
    return sorted(place / name for name in sizes if name.endswith(kind)) if whole else []


def missing(names: Iterable[str]) -> list[str]:
    """Say in words of which kinds there is no file."""
    return [words for kind, words in KINDS.items() if not any(name.endswith(kind) for name in names)]


def fetch(place: Path, download: Download) -> None:
    """Download the source and put its vocabularies and templates into `place`."""
    requirement = f"{PACKAGE}=={version(PACKAGE)}"
    (place / "templates").mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{requirement}: fetching its source, 77 MB, for the vocabularies in it (licence: MIT)", markup=False)
    with console.status("fetching"), tempfile.TemporaryDirectory(prefix=".fetch-", dir=place.parent) as work:
        source = download(requirement, Path(work))
        unpacked = Path(work) / "unpacked"
        (unpacked / "templates").mkdir(parents=True)
        sizes = unpack(source, unpacked)
        for name in sizes:
            os.replace(unpacked / name, place / name)
        (unpacked / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
        os.replace(unpacked / "sizes.json", place / "sizes.json")


def unpack(source: Path, unpacked: Path) -> dict[str, int]:
    """Write what is wanted of a source archive to `unpacked`; give the sizes in bytes by name."""
    sizes = {}
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                match = WANTED.fullmatch(member.name)
                if match and (content := archive.extractfile(member)):
                    with (unpacked / match[1]).open("wb") as out:
                        shutil.copyfileobj(content, out)
                    sizes[match[1]] = member.size
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise FetchError(f"{source.name} is damaged: {error}") from error
    if lacking := missing(sizes):
        raise FetchError(f"{source.name} has no {' and no '.join(lacking)} in vendor/llama.cpp/models")
    return sizes


def fetch_missing(place: Path, download: Download) -> None:
    """Make sure that the vocabularies are in `place`, and print their paths."""
    if not kept(place):
        fetch(place, download)
    for path in kept(place):
        print(path)


def main(arguments: list[str] | None = None, *, download: Download = download_source) -> int:
    """Fetch the vocabularies; give the exit status."""
    description = "Fetch the real vocabularies and templates in the source of llama-cpp-python into the cache."
    argparse.ArgumentParser(description=description).parse_args(arguments)
    return exit_status(lambda: fetch_missing(folder(), download))


if __name__ == "__main__":
    sys.exit(main())
