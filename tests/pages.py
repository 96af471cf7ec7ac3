"""The page in a headless browser, for its tests: windows that notice what should not happen, and what is done there."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from served import Served, served

QUESTION = "the cat sat on the mat"
END: Mapping[str, Any] = {"delta": {}, "finish_reason": "stop", "seed": 1, "timings": {"pieces_per_second": 3}}
"""The last chunk of a reply."""
HOSTILE = (
    "<script>ran = 1</script>",
    "<img src=x onerror='ran = 1'>",
    "<svg/onload=ran=1>",
    "</p></article></template></textarea><script>ran = 1</script>",
    '"><iframe srcdoc="<script>parent.ran = 1</script>"></iframe>',
    "<a href='javascript:ran=1'>a</a><b>b</b>&lt;i&gt;",
    "</script><style>*{display:none}</style><meta http-equiv=refresh content=0;url=//example.org>",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser's window. At the end no page of it ran what it should not, broke its policy or asked elsewhere."""
    context = browser.new_context()
    context.set_default_timeout(10_000)
    context.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => (window.violations ??= []).push(e.effectiveDirective))"
    )
    faults: list[str] = []
    asked: set[str] = set()
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("dialog", lambda dialog: faults.append(dialog.message))
    context.on("console", lambda said: faults.append(said.text) if "Failed to load" not in said.text else None)
    context.on("request", lambda request: asked.add(request.url.split("/")[2]))
    yield context
    for page in context.pages:
        assert page.evaluate("[window.ran, window.violations]") == [None, None]
    assert faults == []
    assert {host.split(":")[0] for host in asked} == {"127.0.0.1"}
    context.close()


@pytest.fixture(scope="module")
def page_server(two_models: Path) -> Iterator[Served]:
    with served(two_models) as running:
        yield running


@pytest.fixture
def chat(context: BrowserContext, page_server: Served) -> Page:
    """The page as it is at first."""
    page = context.new_page()
    page.goto(page_server.url)
    expect(page.locator("#members li")).not_to_have_count(0)
    return page


def opened(context: BrowserContext, server: Served) -> Page:
    """The page, with texts as they are written, and a seed whose first reply is as long as it may be."""
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#members li")).not_to_have_count(0)
    page.get_by_label("Markdown").uncheck()
    page.get_by_label("Seed").fill("1")
    return page


def send(page: Page, text: str = QUESTION) -> dict[str, Any]:
    """Send a message by the keyboard; the body of the request."""
    page.get_by_label("Message", exact=True).fill(text)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    return body_of(asked.value.post_data)


def body_of(text: str | None) -> dict[str, Any]:
    body = json.loads(text or "")
    assert isinstance(body, dict)
    return body


def last(page: Page) -> Locator:
    return page.locator("article").last


def finished(page: Page) -> str:
    """The reply, once it has ended."""
    expect(last(page)).to_have_attribute("data-state", "done")
    return last(page).locator(".reply").text_content() or ""


def figures(page: Page) -> str:
    return (last(page).locator(".figures").text_content() or "").replace("\u00a0", " ")


def stubbed(
    page: Page,
    pieces: Sequence[str],
    *,
    done: bool = True,
    member: str = "bpe_a",
    shares: tuple[float, float] = (1, 0),
) -> None:
    """Have the browser take these pieces for the server's reply."""
    written: Mapping[str, Any] = {"member": member, "probability": 0.5, "shares": shares}
    chunks: list[Mapping[str, Any]] = [{"delta": {"content": text}, **written} for text in pieces]
    streamed(page, [*chunks, *[END] * done])


def streamed(page: Page, chunks: Sequence[Mapping[str, Any]]) -> None:
    """Have the browser take these choices for those of the server's chunks; without an end the stream breaks off."""
    lines = [json.dumps({"choices": [{"index": 0, "finish_reason": None, **chunk}]}) for chunk in chunks]
    whole = bool(chunks[-1].get("finish_reason"))
    body = "".join(f"data: {line}\n\n" for line in [*lines, *["[DONE]"] * whole])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def described(page: Page, *presets: Mapping[str, Any], **ensemble: Any) -> None:
    """Have the browser take this for the server's description of its ensemble, and of it with its presets."""
    whole = {"id": "me-local", "strategy": "me", "unit": "token", "seed": None} | ensemble
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [whole, *presets]}))
    page.reload()


def shows_text_only(page: Page, texts: Sequence[str]) -> None:
    shown = page.locator("#turns").text_content() or ""
    assert [text for text in texts if text not in shown] == []
    tags = set(page.evaluate("[...document.querySelectorAll('#turns *')].map((e) => e.localName)"))
    assert tags <= {
        *("article", "section", "h2", "h3", "p", "span", "div", "button", "details", "summary", "ol", "li"),
        *("table", "caption", "thead", "tbody", "tr", "th", "td"),
    }
