"""Writes docs/page.png: the page of `me-local serve` on the demo ensemble, in a light and calm moment, from a real run.

python scripts/make_page_picture.py SEED QUESTION    (needs Debian's chromium, and `pip install -e '.[test]'`)
"""

import shutil
import sys
from pathlib import Path

import processes
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
SIZE = {"width": 1120, "height": 720}


def main(seed: int, question: str) -> None:
    """Ask the question on the page, point at a piece, and save what there is to see."""
    command = [sys.executable, "-c", "from me_local.cli import main; main()", "serve", "--models", "models.toml"]
    with processes.running([*command, "--port", "0"], cwd=ROOT) as server, sync_playwright() as playwright:
        url = server.expect(r"http://\S+")[0]
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport=SIZE, color_scheme="light")  # type: ignore[arg-type]
        page.goto(url)
        ask(page, seed, question)
        page.screenshot(path=ROOT / "docs" / "page.png")
        chromium.close()


def ask(page: Page, seed: int, question: str) -> None:
    """Get the reply of a seed, and point at one of its less likely pieces."""
    expect(page.locator("#members li")).not_to_have_count(0)
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_attribute("data-state", "done", timeout=120_000)
    print(page.locator(".reply").inner_text())
    page.locator("#settings").evaluate("(settings) => (settings.scrollTop = 0)")
    page.locator(".piece.member-1").nth(1).hover()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
