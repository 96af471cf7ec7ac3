"""The page as others see it: in Firefox, and by the rules of axe-core for those who see, hear or move otherwise."""

import json
import shutil
import subprocess
from pathlib import Path

import fetch_node_clients
import pytest
from pages import finished, last, send, stubbed
from playwright.sync_api import Browser, Page, expect
from served import Served
from test_page_markdown import BECOMES, OTHERWISE, OUTLINES, STAYS

pytestmark = [pytest.mark.node, pytest.mark.slow]

NODE = fetch_node_clients.folder()
"""Before the tests get a cache of their own."""
EVERYTHING = """
# A

*b* `c` [d](https://e.example)

1. f
   - g

> h

```py
i
```

|j|k|
|-|-|
|l|m|

---
"""


def found_by_axe(page: Page) -> list[str]:
    """What axe-core finds on the page as it is."""
    axe = (NODE / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")
    rules = page.evaluate(f"async () => {{ {axe}; return (await axe.run()).violations }}")
    return [f"{rule['id']} ({rule['impact']}): {rule['nodes'][0]['html'][:200]}" for rule in rules]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, page_server: Served, scheme: str) -> None:
    """Not even what is minor: at first, with a reply of everything, its details open, and narrow."""
    context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(page_server.url)
    expect(page.locator("#members li")).not_to_have_count(0)
    assert found_by_axe(page) == []
    stubbed(page, [part for text in EVERYTHING.split(" ") for part in (text, " ")], shares=(0.5, 0.5))
    send(page)
    finished(page)
    assert found_by_axe(page) == []
    last(page).get_by_text("Pieces", exact=True).click()
    page.set_viewport_size({"width": 400, "height": 800})
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".answer")).to_have_count(3)
    expect(last(page)).to_have_attribute("data-state", "done")
    assert found_by_axe(page) == []
    page.get_by_role("button", name="Delete", exact=True).click()
    assert found_by_axe(page) == []
    page.keyboard.press("Escape")
    page.evaluate("document.documentElement.removeAttribute('lang')")  # the control
    assert [rule.split()[0] for rule in found_by_axe(page)] == ["html-has-lang"]
    context.close()


@pytest.mark.firefox
def test_firefox(page_server: Served, tmp_path: Path) -> None:
    """Markdown is the same there, hostile replies stay text, and a conversation survives a reload."""
    script, firefox = Path(__file__).with_name("page.mjs"), shutil.which("firefox-esr")
    texts = [*BECOMES, *STAYS, *OTHERWISE]
    done = subprocess.run(
        ["node", script, NODE, page_server.url, str(firefox)],
        input=json.dumps({"outline": OUTLINES, "texts": texts}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("outlines") == [*BECOMES.values(), *(f"<p>{text}</p>" for text in STAYS), *OTHERWISE.values()]
    assert told.pop("reply") == told.pop("kept") != ""
    assert told == {"faults": [], "ran": None, "axe": []}
