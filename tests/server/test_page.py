"""The page at / in a headless browser: a chat, its controls, hostile text, and what it says when something fails."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_toml
from pages import (
    HOSTILE,
    QUESTION,
    body_of,
    described,
    figures,
    finished,
    last,
    opened,
    send,
    shows_text_only,
    stubbed,
)
from playwright.sync_api import Browser, BrowserContext, Error, Page, Route, expect
from served import Served, Tap, served

from me_local import Ensemble, Message, Overrides, load
from me_local.decoding.reply import Reply
from me_local.server.app import Access
from me_local.server.keeping import Limits

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STATIC = ROOT / "me_local" / "server" / "static"


@pytest.fixture(scope="module")
def models(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = "[sampling]\nmax_tokens = 12"
    return write_toml(tmp_path_factory.mktemp("page"), tiny, "bpe_a", "spm", weights=None, top=top, member="")


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Served]:
    with served(models) as running:
        yield running


@pytest.fixture(scope="module")
def ensemble(models: Path) -> Iterator[Ensemble]:
    """The same models once more: the server's own must not be used while it answers."""
    with load(models) as loaded:
        yield loaded


@pytest.fixture
def page(context: BrowserContext, server: Served) -> Page:
    return opened(context, server)


def direct(ensemble: Ensemble, seed: int, **settings: Any) -> Reply:
    """The reply of the ensemble itself."""
    return ensemble.generate([Message("user", QUESTION)], Overrides(seed=seed, **settings))


def test_a_chat(page: Page, ensemble: Ensemble) -> None:
    body = send(page)
    assert (body["model"], body["seed"], body["strategy"]) == ("me-local", 1, "me")
    assert body["weights"] == {"bpe_a": 0.5, "spm": 0.5}
    assert body["messages"] == [{"role": "user", "content": QUESTION}]
    reply = direct(ensemble, 1)
    assert finished(page) == reply.text != ""
    written = [(step.text, f"piece member-{['bpe_a', 'spm'].index(step.member)}") for step in reply.steps if step.text]
    pieces = last(page).locator(".piece").all()
    assert [(piece.text_content(), piece.get_attribute("class")) for piece in pieces] == written
    share = sum(step.member == "bpe_a" for step in reply.steps) / len(reply.steps)
    shares = f"bpe_a {share:.0%}, spm {1 - share:.0%}".replace("%", " %")
    pattern = rf"ME · {len(reply.steps)} pieces · [\d.]+ pieces/s · {shares} · cut at the limit · seed 1"
    assert re.fullmatch(pattern, figures(page))
    expect(page.locator("#members .share").first).to_have_text(f"wrote {share:.0%}".replace("%", " %"))
    expect(page.locator("#spoken")).to_contain_text("End of the reply.")

    page.get_by_label("System prompt").fill("be brief")
    body = send(page, "a dog")
    assert [message["content"] for message in body["messages"]] == ["be brief", QUESTION, reply.text, "a dog"]
    assert body["messages"][0]["role"] == "system"
    expect(page.locator("article")).to_have_count(2)
    finished(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    assert len(send(page)["messages"]) == 2
    finished(page)


def test_stop(context: BrowserContext, models: Path) -> None:
    with served(models) as server:
        tap = Tap(server.ensemble)
        page = opened(context, server)
        before = page.locator("#composer").bounding_box()
        tap.let(3)
        send(page)
        expect(last(page).locator(".figures")).to_contain_text("3 pieces")
        first, half = last(page).locator(".piece").first, last(page).locator(".reply").text_content()
        place = first.bounding_box()
        assert page.locator("#composer").bounding_box() == before
        page.get_by_role("button", name="Stop").click()
        assert finished(page) == half
        assert figures(page).endswith("· stopped")
        assert (first.bounding_box(), page.locator("#composer").bounding_box()) == (place, before)
        expect(page.get_by_role("button", name="Send")).to_be_focused()
        tap.let(1)
        server.wait_for("running", 0)
        tap.let(100)
        assert [message["content"] for message in send(page, "a dog")["messages"]] == [QUESTION, half, "a dog"]
        finished(page)


def test_a_reload_keeps_what_there_is_of_a_reply(context: BrowserContext, models: Path) -> None:
    with served(models) as server:
        tap = Tap(server.ensemble)
        page = opened(context, server)
        tap.let(3)
        send(page)
        expect(last(page).locator(".figures")).to_contain_text("3 pieces")
        half = last(page).locator(".reply").text_content()
        page.reload()
        assert finished(page) == half != ""
        tap.let(100)
        assert figures(page).endswith(("· stopped", "· not finished"))  # where the page learns before it goes


def test_escape_stops_a_reply_that_has_not_begun(context: BrowserContext, models: Path) -> None:
    with served(models) as server:
        tap = Tap(server.ensemble)
        page = opened(context, server)
        send(page)
        expect(last(page)).to_have_attribute("data-state", "waiting")
        page.keyboard.press("Escape")
        assert finished(page) == ""
        tap.let(100)
        assert [message["content"] for message in send(page, "a dog")["messages"]] == ["a dog"]
        finished(page)


def test_weights_and_strategy(page: Page, ensemble: Ensemble) -> None:
    slider = page.get_by_label("Weight of bpe_a")
    slider.focus()
    page.keyboard.press("End")
    expect(page.locator(".weight")).to_have_text(["100 %", "0 %"])
    page.get_by_label("Seed").fill("2")
    assert send(page)["weights"] == {"bpe_a": 1, "spm": 0}
    assert finished(page) == direct(ensemble, 2, weights={"bpe_a": 1, "spm": 0}).text
    expect(last(page).locator(".member-1")).to_have_count(0)
    slider.focus()
    for _ in range(75):
        page.keyboard.press("ArrowLeft")
    page.get_by_role("radio", name="CE all models").check()
    page.get_by_role("button", name="New chat").click()
    body = send(page)
    assert (body["strategy"], body["weights"]) == ("ce", pytest.approx({"bpe_a": 0.25, "spm": 0.75}))
    reply = direct(ensemble, 2, strategy="ce", weights={"bpe_a": 1, "spm": 3})
    assert finished(page) == reply.text
    last(page).get_by_text("Pieces", exact=True).click()
    expect(last(page).locator("tbody tr")).to_have_count(len(reply.steps))
    rows = [row.locator("td").all_text_contents() for row in last(page).locator("tbody tr").all()]
    assert [row[2] for row in rows] == [f"{step.probability:.1%}".replace("%", "\u00a0%") for step in reply.steps]
    assert {row[1] for row in rows} == {step.member for step in reply.steps}  # each piece is of one vocabulary alone


def test_an_ensemble_that_mixes_as_unite_does(context: BrowserContext, models: Path, tmp_path: Path) -> None:
    union = tmp_path / "union.toml"
    union.write_text(f'[ensemble]\nstrategy = "union"\n{models.read_text()}')
    with served(union) as server, load(models) as ensemble:
        page = opened(context, server)
        expect(page.get_by_role("radio", name="Union")).to_be_checked()
        expect(page.get_by_role("radio", name="Word")).to_be_disabled()
        assert send(page)["strategy"] == "union"
        assert finished(page) == direct(ensemble, 1, strategy="union").text
        assert figures(page).startswith("UNION")
        page.get_by_role("radio", name="ME one model").check()
        expect(page.get_by_role("radio", name="Word")).to_be_enabled()


def test_weights_of_three_stay_one_in_all(page: Page) -> None:
    described(page, members=[{"name": n, "weight": w} for n, w in (("a", 0.5), ("b", 0.3), ("c", 0.2))])
    shares = page.locator(".weight")
    expect(shares).to_have_text(["50 %", "30 %", "20 %"])
    page.get_by_label("Weight of a").fill("80")
    expect(shares).to_have_text(["80 %", "12 %", "8 %"])
    page.get_by_label("Weight of a").fill("100")
    page.get_by_label("Weight of a").fill("60")
    expect(shares).to_have_text(["60 %", "20 %", "20 %"])


def test_units(page: Page, ensemble: Ensemble) -> None:
    page.get_by_label("Word").check()
    assert send(page)["unit"] == "word"
    assert finished(page) == direct(ensemble, 1, unit="word").text
    page.get_by_role("radio", name="CE all models").check()
    expect(page.get_by_label("Word")).to_be_disabled()
    assert (send(page)["unit"], finished(page) != "") == ("token", True)


def test_another_reply_has_another_seed(page: Page, ensemble: Ensemble) -> None:
    page.get_by_label("Seed").fill("")
    send(page)
    finished(page)
    seeds = [figures(page).split()[-1]]
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Another reply").click()
    assert "seed" not in body_of(asked.value.post_data)
    finished(page)
    seeds.append(figures(page).split()[-1])
    assert seeds[0] != seeds[1]  # drawn from 2**32 by the server
    expect(page.locator("article")).to_have_count(1)
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Another reply").click()
    expect(page.get_by_label("Seed")).to_have_value("8")
    expect(last(page).locator(".figures")).to_contain_text("seed 8")
    assert finished(page) == direct(ensemble, 8).text


def test_pointing_at_a_piece_shows_who_wrote_it_and_how_likely_it_was(page: Page, ensemble: Ensemble) -> None:
    send(page)
    finished(page)
    step = next(step for step in direct(ensemble, 1).steps if step.text.strip())
    last(page).locator(".piece").filter(has_text=step.text.strip()).first.hover()
    expect(page.get_by_role("tooltip")).to_have_text(f"{step.member} · {step.probability:.1%}".replace("%", "\u00a0%"))
    page.mouse.move(0, 0)
    expect(page.locator("#tip")).to_be_hidden()


def test_a_piece_of_several_members_has_the_share_of_each(page: Page) -> None:
    stubbed(page, ["the"], shares=(0.6, 0.4))
    send(page)
    finished(page)
    last(page).locator(".piece").hover()
    expect(page.get_by_role("tooltip")).to_have_text("bpe_a · 50.0 % · (bpe_a 60 %, spm 40 %)")
    last(page).get_by_text("Pieces", exact=True).click()
    expect(last(page).locator("td")).to_have_text(["the", "bpe_a 60 %, spm 40 %", "50.0 %"])
    expect(page.locator(".share")).to_have_text(["wrote 60 %", "wrote 40 %"])


def test_copy(context: BrowserContext, page: Page) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    stubbed(page, ["one\n", " <b>two"])
    send(page)
    finished(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "one\n <b>two"


def test_by_keyboard_alone(page: Page) -> None:
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("the cat")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("sat")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    assert body_of(asked.value.post_data)["messages"] == [{"role": "user", "content": "the cat\nsat"}]
    finished(page)
    for name in ("Compare", "Another reply", "Copy", "Pieces"):
        page.keyboard.press("Shift+Tab")
        expect(last(page).get_by_text(name, exact=True)).to_be_focused()
    controls = "[...document.querySelectorAll('input, textarea, select')]"
    assert page.evaluate(f"{controls}.filter((e) => !e.labels.length && !e.ariaLabel).map((e) => e.id)") == []


def test_hostile_messages_and_system_prompts_stay_text(page: Page) -> None:
    page.get_by_label("System prompt").fill("\n".join(HOSTILE))
    for text in HOSTILE[:3]:
        assert send(page, text)["messages"][0]["content"] == "\n".join(HOSTILE)
        finished(page)
    shows_text_only(page, HOSTILE[:3])


def test_hostile_replies_stay_text(page: Page) -> None:
    split = [part for text in HOSTILE for part in (text[:4], text[4:])]
    stubbed(page, [*HOSTILE, *split])
    send(page)
    assert finished(page) == "".join(HOSTILE) * 2
    last(page).get_by_text("Pieces", exact=True).click()
    page.locator(".piece").first.hover()
    shows_text_only(page, HOSTILE)
    assert [
        text for text in HOSTILE if "." not in text and text not in (page.locator("#spoken").text_content() or "")
    ] == []


def test_hostile_names_and_errors_stay_text(page: Page) -> None:
    described(page, members=[{"name": HOSTILE[0], "weight": 0.5}, {"name": HOSTILE[1], "weight": 0.5}])
    expect(page.locator("#members .name")).to_have_text(list(HOSTILE[:2]))
    stubbed(page, ["a"], member=HOSTILE[0])
    send(page)
    finished(page)
    page.locator(".piece").hover()
    expect(page.locator("#tip")).to_contain_text(HOSTILE[0])
    refuse = {"error": {"message": "".join(HOSTILE), "code": None}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(json=refuse, status=400))
    send(page)
    finished(page)
    shows_text_only(page, HOSTILE)


def test_the_policy_holds_where_the_page_would_not(browser: Browser, server: Served) -> None:
    """The control of the tests above: markup that did get in is refused, and they would see it."""
    context = browser.new_context()
    page = opened(context, server)
    page.evaluate(
        "addEventListener('securitypolicyviolation', (e) => (window.violations ??= []).push(e.effectiveDirective))"
    )
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<img src=x onerror=\"ran = 1\">'")
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate("fetch('http://localhost:1/')")
    assert page.evaluate("violations") == ["require-trusted-types-for", "connect-src"]
    assert page.evaluate("window.ran") is None
    context.close()


def test_a_conversation_that_is_too_long(page: Page) -> None:
    send(page, "the cat " * 600)
    assert finished(page) == ""
    expect(last(page).locator(".notice")).to_have_text(
        re.compile(r"The conversation is too long: the prompt has \d+ tokens for member .* Or start a new chat\.")
    )
    assert len(send(page)["messages"]) == 1
    assert finished(page) != ""


def test_what_the_server_refuses(page: Page) -> None:
    page.get_by_label("Seed").fill("many")
    send(page)
    finished(page)
    expect(last(page).locator(".notice")).to_have_text("Seed: Input should be a valid integer.")
    page.get_by_label("Seed").fill("1")
    page.get_by_role("button", name="Try again").click()
    expect(last(page).locator(".notice")).to_be_empty()
    assert finished(page) != ""


def test_a_busy_server(context: BrowserContext, models: Path) -> None:
    with served(models, limits=Limits(queue=0)) as server:
        tap = Tap(server.ensemble)
        busy, page = opened(context, server), opened(context, server)
        send(busy)
        server.wait_for("running", 1)
        send(page)
        finished(page)
        expect(last(page).locator(".notice")).to_have_text(re.compile(r"The server is busy: .* Try again in \d+ s\."))
        busy.keyboard.press("Escape")
        tap.let(100)
        server.wait_for("running", 0)
        page.get_by_role("button", name="Try again").click()
        expect(last(page).locator(".piece")).not_to_have_count(0)
        assert finished(page) != ""
        expect(last(page).locator(".notice")).to_be_empty()


@pytest.mark.slow
def test_a_reply_that_takes_too_long(context: BrowserContext, models: Path) -> None:
    with served(models, limits=Limits(timeout=2)) as server:
        tap = Tap(server.ensemble)
        page = opened(context, server)
        tap.let(2)
        send(page)
        finished(page)
        assert re.match(r"ME · 2 pieces · .* · not finished$", figures(page))
        expect(last(page).locator(".notice")).to_have_text(
            "The server gave up: the reply was not finished within 2 s (--timeout)."
        )
        tap.let(100)


def test_a_server_that_goes_away(context: BrowserContext, models: Path) -> None:
    with served(models, limits=Limits(grace=0)) as server:
        tap = Tap(server.ensemble)
        page = opened(context, server)
        tap.let(2)
        send(page)
        expect(last(page).locator(".figures")).to_contain_text("2 pieces")
        server.server.should_exit = True
        finished(page)
        expect(last(page).locator(".notice")).to_have_text("The server is shutting down.")
        tap.let(100)
    send(page)
    finished(page)
    expect(last(page).locator(".notice")).to_contain_text("The server cannot be reached.")


def test_a_stream_that_breaks_off(page: Page) -> None:
    stubbed(page, ["one ", "two"], done=False)
    send(page)
    assert finished(page) == "one two"
    expect(last(page).locator(".notice")).to_have_text("The connection ended before the reply was finished.")


@pytest.mark.parametrize("body", ["<h1>Bad gateway</h1>", "null", '{"error": "no"}'])
def test_an_answer_that_is_not_the_servers(page: Page, body: str) -> None:
    def fulfil(route: Route) -> None:
        route.fulfill(status=502, body=body)

    page.route("**/v1/chat/completions", fulfil)
    send(page)
    finished(page)
    expect(last(page).locator(".notice")).to_have_text("The server answered with status 502.")


def test_a_server_that_asks_for_a_key(context: BrowserContext, models: Path) -> None:
    with served(models, Access(key="open sesame")) as server:
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("API key").fill("guess")
        page.keyboard.press("Enter")
        expect(page.locator("#key-problem")).to_have_text("The server did not take that key.")
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("open sesame")
        page.keyboard.press("Enter")
        expect(page.get_by_label("API key")).to_be_hidden()
        send(page)
        assert finished(page) != ""
        page.reload()
        expect(page.locator("#members li")).to_have_count(2)
        assert page.evaluate("[JSON.stringify(localStorage).includes('sesame'), document.cookie]") == [False, ""]


def test_a_seed_of_the_server_is_shown(page: Page) -> None:
    described(page, seed=40, members=[{"name": "bpe_a", "weight": 1}])
    expect(page.get_by_label("Seed")).to_have_value("40")


def luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(c * part for c, part in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The contrast of WCAG 2."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_light_and_dark() -> None:
    css = (STATIC / "page.css").read_text()
    light, dark = [dict(re.findall(r"--([\w-]+): ([#\w%]+);", part)) for part in css.split("prefers-color-scheme")[:2]]
    for theme in (light, light | dark):
        colour = {n: [int(v[i : i + 2], 16) / 255 for i in (1, 3, 5)] for n, v in theme.items() if v.startswith("#")}
        tint = int(theme["tint"].rstrip("%")) / 100
        for text, ground in (
            ("ink", "paper"),
            ("ink", "panel"),
            ("soft", "paper"),
            ("soft", "panel"),
            ("alarm", "paper"),
        ):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        assert contrast(colour["on-accent"], colour["accent"]) >= 4.5
        assert contrast(colour["edge"], colour["paper"]) >= 3  # what outlines a control
        for i in range(8):
            member = colour[f"m{i}"]
            mixed = [tint * m + (1 - tint) * p for m, p in zip(member, colour["paper"], strict=True)]
            assert contrast(colour["ink"], mixed) >= 4.5, i
            assert contrast(member, mixed) >= 3, i  # the underline
