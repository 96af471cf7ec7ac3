"""Conversations on the page: kept in the browser, named, exported, deleted; thoughts, calls, comparisons and looks."""

import json
from pathlib import Path
from typing import Any

import pytest
from pages import END, HOSTILE, body_of, described, figures, finished, last, send, streamed, stubbed
from playwright.sync_api import BrowserContext, Page, Route, expect
from served import Served

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
LARGEST = 100_000  # bytes of a first load


def ask(page: Page, text: str, *pieces: str) -> None:
    """Have a message answered by these pieces."""
    stubbed(page, pieces)
    send(page, text)
    finished(page)


def kept(page: Page) -> list[str]:
    return page.locator("#conversations button").all_text_contents()


def test_conversations_are_kept_and_gone_on_with(context: BrowserContext, chat: Page) -> None:
    ask(chat, "first\nquestion", "**one**", " two")
    chat.get_by_role("button", name="New chat").click()
    ask(chat, "second", "three")
    assert kept(chat) == ["second", "first"]
    chat.reload()
    assert finished(chat) == "three"
    chat.get_by_role("button", name="first").click()
    expect(chat.locator("#conversations [aria-current]")).to_have_text("first")
    assert finished(chat) == "one two"
    assert figures(chat) == "ME · 2 pieces · 3.0 pieces/s · bpe_a 100 %, spm 0 % · seed 1"
    expect(last(chat).locator("strong .piece")).to_have_class("piece member-0")
    ask(chat, "third", "four")
    assert kept(chat) == ["first", "second"]
    chat.reload()
    with chat.expect_request("**/v1/chat/completions") as asked:
        chat.get_by_role("button", name="Another reply").last.click()
    said = [message["content"] for message in body_of(asked.value.post_data)["messages"]]
    assert said == ["first\nquestion", "**one** two", "third"]
    finished(chat)
    other = context.new_page()
    other.goto(chat.url)
    expect(other.locator("#conversations button")).to_have_text(["first", "second"])
    expect(other.locator("article")).to_have_count(0)


def test_names_and_deleting(chat: Page) -> None:
    ask(chat, "first", "one")
    name = chat.get_by_label("Name of the conversation")
    name.fill(HOSTILE[1])
    name.press("Enter")
    assert kept(chat) == [HOSTILE[1]]
    chat.reload()
    expect(name).to_have_value(HOSTILE[1])
    chat.get_by_role("button", name="Delete", exact=True).click()
    chat.get_by_role("button", name="Keep it").click()
    assert kept(chat) == [HOSTILE[1]]
    chat.get_by_role("button", name="Delete", exact=True).click()
    chat.get_by_role("button", name="Delete it").click()
    expect(chat.locator("article")).to_have_count(0)
    expect(chat.get_by_label("Message", exact=True)).to_be_focused()
    assert kept(chat) == []
    ask(chat, "second", "one")
    chat.get_by_role("button", name="Delete", exact=True).click()
    chat.keyboard.press("Escape")
    expect(chat.locator("#delete-dialog")).to_be_hidden()
    assert kept(chat) == ["second"]
    chat.get_by_role("button", name="Delete", exact=True).click()
    chat.get_by_role("button", name="Delete it").click()
    expect(chat.locator("article")).to_have_count(0)
    chat.reload()
    expect(chat.locator("#none")).to_be_visible()


def exported(page: Page, kind: str) -> tuple[str, str]:
    """The name and the text of a file."""
    with page.expect_download() as saved:
        page.get_by_role("button", name=f"Export {kind}").click()
    return saved.value.suggested_filename, Path(saved.value.path()).read_text("utf-8")


def test_exports(chat: Page) -> None:
    thought = {"delta": {"reasoning_content": "hm"}, "member": "spm", "probability": 0.5, "shares": [0.25, 0.75]}
    text = {"delta": {"content": "*one*"}, "member": "bpe_a", "probability": 0.123456, "shares": [1, 0]}
    streamed(chat, [thought, text, END])
    send(chat, "../a: <b>?")
    finished(chat)
    name, markdown = exported(chat, "Markdown")
    assert name.endswith("a b.md")
    assert markdown == "# ../a: <b>?\n\n## You\n\n../a: <b>?\n\n## me-local\n\n*one*\n"
    name, written = exported(chat, "JSON")
    [turn] = json.loads(written)["turns"]
    assert turn["text"] == "../a: <b>?"
    [answer] = turn["answers"]
    assert answer["pieces"] == [["hm", 1, 0.5, [0.25, 0.75], 1], ["*one*", 0, 0.1235, None, 0]]
    assert (answer["model"], answer["names"], answer["strategy"]) == ("me-local", ["bpe_a", "spm"], "ME")


def test_what_is_kept_and_broken_is_said_and_left(chat: Page) -> None:
    ask(chat, "first", "one")
    chat.evaluate("localStorage['me-local:x'] = '{'; localStorage['me-local:y'] = '{\"turns\": [{}]}'")
    chat.evaluate("localStorage['me-local-look'] = 'null'")
    chat.reload()
    expect(chat.locator("#problem")).to_have_text("2 of the kept conversations cannot be read: left as they are.")
    assert kept(chat) == ["first"]
    assert chat.evaluate("[localStorage['me-local:x'], localStorage.length]") == ["{", 4]


def kept_turn(page: Page, **turn: Any) -> None:
    """Have the browser keep one more conversation, "other", of this turn."""
    page.evaluate(
        "(turn) => localStorage['me-local:z'] = JSON.stringify({ id: 'z', title: 'other', changed: 1, turns: [turn] })",
        {"text": "second", "answers": []} | turn,
    )
    page.reload()


def test_calls_that_are_kept_and_broken(chat: Page) -> None:
    for calls in ([None], [{"id": "a", "name": "b"}]):
        kept_turn(chat, answers=[{"model": "me-local", "names": ["a", "b"], "pieces": [], "calls": calls}])
        expect(chat.locator("#problem")).to_have_text("1 of the kept conversations cannot be read: left as they are.")


def test_a_turn_whose_reply_was_lost(chat: Page) -> None:
    """As that of a browser that was killed in the middle: it is answered once more, and there is nothing to compare."""
    kept_turn(chat)
    chat.get_by_role("button", name="other").click()
    expect(chat.get_by_role("button", name="Compare")).to_be_hidden()
    stubbed(chat, ["two"])
    chat.get_by_role("button", name="Another reply").click()
    assert finished(chat) == "two"
    expect(chat.get_by_role("button", name="Compare")).to_be_visible()


def test_a_browser_that_keeps_nothing(context: BrowserContext, page_server: Served) -> None:
    for storage in ("localStorage", "sessionStorage"):
        context.add_init_script(f"Object.defineProperty(window, '{storage}', {{ get() {{ throw new Error('no') }} }})")
    page = context.new_page()
    page.goto(page_server.url)
    expect(page.locator("#members li")).not_to_have_count(0)
    ask(page, "first", "one")
    expect(page.locator("#problem")).to_contain_text("This browser does not keep the conversation")
    assert exported(page, "Markdown")[0] == "first.md"


@pytest.mark.parametrize("others", [1, 200])
def test_no_more_room(chat: Page, others: int) -> None:
    """For the largest text of all, and for as many conversations as there may be."""
    one = json.dumps({"id": "a", "title": "x" * (4_000_000 if others == 1 else 1), "changed": 1, "turns": []})
    chat.evaluate("(all) => Object.assign(localStorage, all)", {f"me-local:{index}": one for index in range(others)})
    ask(chat, "first", "one")
    expect(chat.locator("#problem")).to_have_text(
        "There is no room for more conversations: this one is not kept. Delete some."
    )
    assert finished(chat) == "one"


def test_the_browsers_own_limit(chat: Page) -> None:
    chat.evaluate("localStorage.other = 'x'.repeat(5_200_000)")
    ask(chat, "x" * 60_000, "one")
    expect(chat.locator("#problem")).to_contain_text("QuotaExceededError")
    assert finished(chat) == "one"


def test_thoughts_are_folded_and_not_said_again(chat: Page) -> None:
    written: Any = {"member": "spm", "probability": 0.5, "shares": [0, 1]}
    thoughts = [{"delta": {"reasoning_content": text}, **written} for text in ("I *think* ", HOSTILE[0])]
    streamed(chat, [*thoughts, {"delta": {"content": "42"}, **written}, END])
    send(chat)
    assert finished(chat) == "42"
    thought = last(chat).locator(".thoughts")
    expect(thought.locator(".piece").first).to_be_hidden()
    thought.get_by_text("Thoughts").click()
    expect(thought.locator("div").first).to_have_text(f"I think {HOSTILE[0]}")
    expect(thought.locator("em")).to_have_text("think")
    assert "think" not in (chat.locator("#spoken").text_content() or "")
    assert [message["content"] for message in send(chat, "why")["messages"]][1:] == ["42", "why"]
    chat.reload()
    expect(last(chat).locator(".thoughts")).to_have_count(1)


def test_a_call_of_a_tool_and_its_result(chat: Page) -> None:
    chat.get_by_label("Tools").fill("[{")
    chat.get_by_label("Message", exact=True).fill("late?")
    chat.keyboard.press("Enter")
    expect(last(chat).locator(".notice")).to_contain_text("The tools are no JSON")
    chat.get_by_label("Tools").fill(json.dumps([TOOL]))
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"a": "<b>"}'}}
    streamed(chat, [{"delta": {"tool_calls": [call]}}, {**END, "finish_reason": "tool_calls"}])
    assert send(chat, "how late?")["tools"] == [TOOL]
    expect(last(chat).locator(".call")).to_have_text('Call of clock{"a": "<b>"}')
    expect(last(chat).locator(".notice")).to_be_empty()
    chat.reload()
    expect(last(chat).locator(".call b")).to_have_text("clock")
    called = {"id": "call_1", "type": "function", "function": call["function"]}
    assert send(chat, "noon")["messages"] == [
        {"role": "user", "content": "how late?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
    ]


def test_tools_that_the_server_itself_takes(chat: Page) -> None:
    """A result goes to the models, too."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    streamed(chat, [{"delta": {"tool_calls": [call]}}, {**END, "finish_reason": "tool_calls"}])
    send(chat, "how late?")
    expect(last(chat).locator(".call")).to_have_count(1)
    chat.unroute("**/v1/chat/completions")
    chat.get_by_label("Tools").fill(json.dumps([TOOL]))
    chat.get_by_label("Seed").fill("1")
    send(chat, "noon")
    finished(chat)
    expect(last(chat).locator(".notice")).to_be_empty()


def test_pieces_that_come_in_any_case_have_no_member(chat: Page) -> None:
    forced = {"member": "", "probability": 1.0, "shares": [0, 0]}
    chosen = {"member": "spm", "probability": 0.5, "shares": [0, 1]}
    streamed(chat, [{"delta": {"content": "a"}, **forced}, {"delta": {"content": "b"}, **chosen}, END])
    send(chat)
    assert finished(chat) == "ab"
    expect(last(chat).locator(".piece").first).to_have_class("piece forced")
    assert "bpe_a 0 %, spm 50 %" in figures(chat)
    bar = "parts => parts.map((e) => [e.className, e.style.flexGrow])"
    assert last(chat).locator(".who span").evaluate_all(bar) == [["member-1", "0.5"], ["forced", "0.5"]]
    last(chat).locator(".piece").first.hover()
    expect(chat.get_by_role("tooltip")).to_have_text("comes in any case")


def test_who_wrote_which_paragraph(chat: Page) -> None:
    pieces = [("a", "bpe_a"), ("\n\n", "spm"), ("b", "spm"), ("c", "spm")]
    shares = {"bpe_a": [1, 0], "spm": [0, 1]}
    chunks = [
        {"delta": {"content": text}, "member": member, "probability": 1, "shares": shares[member]}
        for text, member in pieces
    ]
    streamed(chat, [*chunks, END])
    send(chat)
    finished(chat)
    expect(last(chat).locator(".block")).to_have_count(2)
    last(chat).get_by_text("Pieces", exact=True).click()
    lines = last(chat).locator(".pieces li").all_text_contents()
    assert [line.replace("\u00a0", " ") for line in lines] == ["bpe_a 50 %, spm 50 %: a", "bpe_a 0 %, spm 100 %: bc"]


def test_comparing(chat: Page) -> None:
    """The real server: each member alone, with the seed of the ensemble; the conversation goes on with all together."""
    chat.get_by_label("Seed").fill("3")
    send(chat)
    asked: list[dict[str, Any]] = []
    chat.on("request", lambda request: asked.append(body_of(request.post_data)) if request.post_data else None)
    finished(chat)
    chat.get_by_role("button", name="Compare").click()
    expect(last(chat).locator(".answer")).to_have_count(3)
    expect(last(chat)).to_have_attribute("data-state", "done")
    assert [(body["model"], body["seed"]) for body in asked] == [("me-local/bpe_a", 3), ("me-local/spm", 3)]
    expect(last(chat).locator(".answer h2")).to_have_text(["All together", "bpe_a alone", "spm alone"])
    for index in (1, 2):
        pieces = last(chat).locator(".answer").nth(index).locator(".piece")
        expect(pieces).not_to_have_count(0)
        assert set(pieces.evaluate_all("all => all.map((e) => e.className)")) == {f"piece member-{index - 1}"}
    tops = last(chat).locator(".answer").evaluate_all("all => all.map((e) => e.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    chat.set_viewport_size({"width": 400, "height": 800})
    tops = last(chat).locator(".answer").evaluate_all("all => all.map((e) => e.getBoundingClientRect().top)")
    assert tops == sorted(set(tops))
    assert chat.evaluate("document.documentElement.scrollWidth") <= 400
    chat.reload()
    expect(last(chat).locator(".answer")).to_have_count(3)
    assert len(send(chat, "a dog")["messages"]) == 3
    finished(chat)


def test_colours_and_markdown_can_be_switched_off(chat: Page) -> None:
    ask(chat, "first", "**one**")
    assert finished(chat) == "one"
    background = "(element) => getComputedStyle(element).backgroundColor"
    piece = last(chat).locator(".piece")
    clear = "rgba(0, 0, 0, 0)"
    assert piece.evaluate(background) != clear
    chat.get_by_label("Colours").uncheck()
    assert piece.evaluate(background) == clear
    expect(last(chat).locator(".who")).to_be_hidden()
    chat.get_by_label("Markdown").uncheck()
    assert finished(chat) == "**one**"
    chat.reload()
    expect(chat.get_by_label("Colours")).not_to_be_checked()
    assert finished(chat) == "**one**"


def test_presets_of_weights_in_the_middle_of_a_conversation(chat: Page) -> None:
    described(chat, members=[{"name": "bpe_a", "weight": 0.25}, {"name": "spm", "weight": 0.75}])
    preset = chat.get_by_label("Weights", exact=True)
    expect(preset.locator("option")).to_have_text(["As in models.toml", "Even", "Only bpe_a", "Only spm", "By hand"])
    stubbed(chat, ["one"])
    assert send(chat)["weights"] == {"bpe_a": 0.25, "spm": 0.75}
    finished(chat)
    preset.select_option("Only spm")
    chat.get_by_role("radio", name="CE all models").check()
    body = send(chat)
    assert (body["weights"], body["strategy"], len(body["messages"])) == ({"bpe_a": 0, "spm": 1}, "ce", 3)
    finished(chat)
    chat.get_by_label("Weight of bpe_a").fill("40")
    expect(preset).to_have_value("By hand")
    assert send(chat)["weights"] == {"bpe_a": 0.4, "spm": 0.6}


def test_a_preset_is_taken_with_its_weights(chat: Page) -> None:
    """What it does not set is the server's affair; members are compared with its settings, too."""
    members = [{"name": "bpe_a", "weight": 0.25}, {"name": "spm", "weight": 0.75}]
    others = [{"name": "bpe_a", "weight": 0.5}, {"name": "spm", "weight": 0.5}]
    code = {"id": "me-local:code", "strategy": "ce", "unit": "token", "seed": None, "members": others}
    described(chat, code, {"id": "me-local/spm"}, members=members)
    select = chat.get_by_label("Preset", exact=True)
    expect(select.locator("option")).to_have_text(["As in models.toml", "code"])
    stubbed(chat, ["one"])
    assert send(chat)["model"] == "me-local"
    finished(chat)
    select.select_option("code")
    expect(chat.get_by_label("System prompt")).to_have_attribute("placeholder", "As in code")
    expect(chat.get_by_label("Weights", exact=True)).to_have_value("As in code")
    body = send(chat)
    assert (body["model"], body["strategy"], body["weights"]) == ("me-local:code", "ce", {"bpe_a": 0.5, "spm": 0.5})
    finished(chat)
    with chat.expect_request("**/v1/chat/completions") as asked:
        last(chat).locator(".compare").click()
    body = body_of(asked.value.post_data)
    assert (body["model"], body["weights"]) == ("me-local:code", {"bpe_a": 1, "spm": 0})
    select.select_option("As in models.toml")
    expect(chat.get_by_label("Weights", exact=True)).to_have_value("As in models.toml")


def test_without_presets_there_is_no_choice(chat: Page) -> None:
    described(chat, members=[{"name": "bpe_a", "weight": 1}])
    expect(chat.get_by_label("Weight of bpe_a")).to_be_visible()
    expect(chat.locator("#presets")).to_be_hidden()


def test_code_is_copied(context: BrowserContext, chat: Page) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(chat, "first", "```py\na = '<b>'\n", "\nb\n```\n")
    last(chat).locator(".copy-code").click()
    expect(last(chat).locator(".copy-code")).to_have_text("Copied")
    assert chat.evaluate("navigator.clipboard.readText()") == "a = '<b>'\n\nb"


def test_the_first_load_is_small(context: BrowserContext, page_server: Served) -> None:
    sizes: dict[str, int] = {}
    page = context.new_page()
    page.on("response", lambda answer: sizes.update({answer.url: len(answer.body())}))
    page.goto(page_server.url)
    expect(page.locator("#members li")).not_to_have_count(0)
    page.wait_for_load_state("networkidle")
    assert len(sizes) > 10
    assert sum(sizes.values()) < LARGEST, sizes


def test_behind_a_prefix(context: BrowserContext, page_server: Served) -> None:
    """Where only what is below a path comes to the server."""
    prefix = f"{page_server.url}/a/prefix"
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))

    def passed_on(route: Route) -> None:
        route.fulfill(response=route.fetch(url=route.request.url.replace("/a/prefix", "")))

    page.route(f"{prefix}/**", passed_on)
    page.goto(f"{prefix}/")
    expect(page.locator("#members li")).to_have_count(2)
    send(page)
    assert finished(page) != ""
    assert all(url.startswith(prefix) for url in asked)
