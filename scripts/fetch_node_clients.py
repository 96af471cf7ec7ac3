"""Fetch the packages of Node that server and page are tried with, into the cache, by npm (191 MB; no script runs).

Contract: afterwards ``folder()`` holds them, and its path is printed. Or the script has said in one line on stderr
what went wrong and exits with status 1.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from pip_downloads import FetchError, cache_folder, exit_status
from processes import run

PACKAGES = (
    *("openai@6", "ai@6", "@ai-sdk/openai-compatible@2", "@anthropic-ai/sdk@1", "zod@4"),
    "@qwen-code/qwen-code@0.15",
    *("axe-core@4", "puppeteer-core@24"),  # look over the page; drive Firefox
)
OPTIONS = ("--engine-strict", "--ignore-scripts", "--no-audit", "--no-fund")  # the first: not with a Node too old
LIMIT = 300.0  # seconds


def folder() -> Path:
    """Give the folder that keeps them; its name changes with their versions."""
    return cache_folder() / "node-clients" / "-".join(package.rpartition("@")[2] for package in PACKAGES)


def fetched(place: Path) -> bool:
    """Say whether they are there, and Node to run them."""
    modules = [place / "node_modules" / package.rpartition("@")[0] for package in PACKAGES]
    return shutil.which("node") is not None and all((module / "package.json").is_file() for module in modules)


def fetch(place: Path) -> None:
    """Have npm install them, and print where."""
    if not fetched(place):
        place.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", place, *OPTIONS, *PACKAGES]
        try:
            done = run(command, seconds=LIMIT)
        except FileNotFoundError as error:
            raise FetchError("npm is not there: apt-get install nodejs npm") from error
        except subprocess.TimeoutExpired as error:
            raise FetchError(f"npm did not end within {LIMIT:.0f} s") from error
        if done.returncode:
            raise FetchError(f"npm: {done.stderr.strip().splitlines()[-1:]}")
    print(place)


def main(arguments: list[str] | None = None) -> int:
    """Fetch them; give the exit status."""
    argparse.ArgumentParser(description="Fetch the packages of Node that server and page are tried with.").parse_args(
        arguments
    )
    return exit_status(lambda: fetch(folder()))


if __name__ == "__main__":
    sys.exit(main())
