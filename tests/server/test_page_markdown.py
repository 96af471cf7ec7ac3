"""Markdown on the page: what becomes what, replies that grow, and 40 that would like to be more than text."""

from collections.abc import Sequence
from typing import Any

import pytest
from pages import HOSTILE, finished, last, send, stubbed
from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

OUTLINE = """
const { Shown } = await import(new URL("shown.js", location));
const outline = (node) => {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  const inner = [...node.childNodes].map(outline).join("");
  const { localName: tag } = node;
  if (tag === "span" || tag === "button" || node.matches(".block, .who, .head, .scroll, .code")) {
    return node.matches(".who, .head") ? "" : inner;
  }
  const said = ["href", "start", "class"].filter((name) => node.hasAttribute(name));
  return `<${[tag, ...said.map((name) => `${name}=${node.getAttribute(name)}`)].join(" ")}>${inner}</${tag}>`;
};
const shownBy = (texts) => {
  const shown = new Shown(document.createElement("div"));
  for (const text of texts) shown.add({ text, member: 0, shares: [1, 0], probability: 1 });
  return shown;
};
"""
"""What a test in the page has: `shownBy` shows pieces, `outline` is their elements without those that only decorate."""

OUTLINES = f"""
{OUTLINE}
return given.map((text) => {{
  const shown = shownBy(text.match(/.{{1,3}}/gsu) ?? []);
  shown.draw(true);
  return [...shown.element.childNodes].map(outline).join("");
}});
"""
"""Gives those of texts, which come in pieces of up to three characters."""

BECOMES = {
    "*a* **b** ***c*** _d_ __e__ ~~f~~": (
        "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <strong>e</strong> <s>f</s></p>"
    ),
    "snake_case_name 2 * 3 * 4 ~5~ **open": "<p>snake_case_name 2 * 3 * 4 ~5~ **open</p>",
    "*a **b*** **c *d* e**": "<p><em>a <strong>b</strong></em> <strong>c <em>d</em> e</strong></p>",
    r"\*a\* \[b\](c) \q": r"<p>*a* [b](c) \q</p>",
    "`a*b*` ``c`d`` ` e": "<p><code>a*b*</code> <code>c`d</code> ` e</p>",
    "one\ntwo\n\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "# A *b*\n## C ##\n####### d\n#e": "<h3>A <em>b</em></h3><h4>C</h4><p>####### d\n#e</p>",
    "a\n---\nb\n* * *": "<p>a</p><hr></hr><p>b</p><hr></hr>",
    "- a\n- b\n  c\n\nd": "<ul><li>a</li><li>b\nc</li></ul><p>d</p>",
    "1. a\n  - b\n    - c\n2. d": "<ol start=1><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>",
    "3) a\n\n4) b": "<ol start=3><li><p>a</p></li><li><p>b</p></li></ol>",
    "- a\n\n  b\n+ c": "<ul><li><p>a</p><p>b</p></li></ul><ul><li>c</li></ul>",
    "in 1990\n1990. was\n1. a": "<p>in 1990\n1990. was</p><ol start=1><li>a</li></ol>",
    "> a\n> > b\n>\n> c\nd": "<blockquote><p>a</p><blockquote><p>b</p></blockquote><p>c</p></blockquote><p>d</p>",
    "```py\nx = '*'\n\n  y\n```\nz": "<pre><code>x = '*'\n\n  y</code></pre><p>z</p>",
    "~~~~\n```\n~~~\n~~~~": "<pre><code>```\n~~~</code></pre>",
    "- ```\n  a\n  ```\n- b": "<ul><li><pre><code>a</code></pre></li><li>b</li></ul>",
    "|a|*b*|\n|:-:|-|\n|`c`|d\\|e|\n|f|\n\ng": (
        "<table><thead><tr><th class=center>a</th><th class=start><em>b</em></th></tr></thead>"
        "<tbody><tr><td class=center><code>c</code></td><td class=start>d|e</td></tr>"
        "<tr><td class=center>f</td><td class=start></td></tr></tbody></table><p>g</p>"
    ),
    "a | b\nc": "<p>a | b\nc</p>",
    '[a *b*](https://c.example/d "e") [f](<https://g.example/h i>)': (
        "<p><a href=https://c.example/d>a <em>b</em></a> <a href=https://g.example/h%20i>f</a></p>"
    ),
    "(see https://a.example/b_(c)_d). <mailto:e@f.example>": (
        "<p>(see <a href=https://a.example/b_(c)_d>https://a.example/b_(c)_d</a>). "
        "<a href=mailto:e@f.example>mailto:e@f.example</a></p>"
    ),
    "![a](https://b.example/c.png)": "<p><a href=https://b.example/c.png>a</a></p>",
    "a  b\tc\u00a0d": "<p>a  b\tc\u00a0d</p>",
}

DEEP = 10_000
STAYS = (
    *HOSTILE,
    "<p onclick='ran = 1'>a</p><div><!-- b --><?c?><![CDATA[d]]>",
    "<details open ontoggle=ran=1><summary>a",
    "<math><mtext></table><mglyph><style><img src onerror=ran=1>",
    "<base href='//evil.example'><form action=x><input autofocus onfocus=ran=1>",
    "&lt;script&gt;ran = 1&lt;/script&gt; &#60;b&#62; &colon;",
    "[a](javascript:ran=1)",
    "[a](JaVaScRiPt:ran=1) [b](javascript&colon;ran=1)",
    "[a](java\tscript:ran=1)",
    "[a](\x01javascript:ran=1)",
    "[a](data:text/html,<script>ran=1</script>)",
    "![a](data:image/svg+xml;base64,PHN2Zz4=)",
    "[a](vbscript:ran) [b](file:///etc/passwd) [c](blob:d) [e](ftp://f.example)",
    "[a](//evil.example) [b](/v1/models) [c](#d) [e](?f) [g](h)",
    "[a](https://) [b](http://[) [c]() [d]( ) [e](http s://x)",
    "<javascript:ran=1> <data:text/html,a> <//evil.example>",
    "[a]: javascript:ran=1\n[a] [a][] [b][a]",
    "[" * DEEP,
    "[" * DEEP + "a" + "]" * DEEP,
    "![" * DEEP + "](" * DEEP,
    "a" + "`" * DEEP,
    "<" * DEEP + "a" + ">" * DEEP,
    "(" * DEEP + "a](" + ")" * DEEP,
    "\u202egnp.exe\u202c \u2066a\u2069 \u200fb \u2068",
    "\x00\x01\x1b[31m\u2028\u2029\ufeff\U000e0061",
    "a\u0301\u0302" * 500,
    "x__proto__x constructor toString.constructor('ran = 1')() ${ran = 1} {{ran = 1}}",
    "|a|b|\n|-|\n|c|d|",
    "|" + "a|" * 5_000 + "\n|" + "-|" * 5_000,
    "<a href='//evil.example' target=_top rel=opener>a</a>",
    "x" * 100_000,
    "<template><script>ran = 1</script></template><slot onslotchange=ran=1>",
    "<link rel=stylesheet href=//evil.example><object data=x><embed src=x>",
    "<video src=x onerror=ran=1><audio src=x onerror=ran=1>",
)
"""What is text to the last character."""

OTHERWISE = {
    "```\n<script>ran = 1</script>": "<pre><code><script>ran = 1</script></code></pre>",
    "# <img src=x onerror=ran=1>": "<h3><img src=x onerror=ran=1></h3>",
    "- <b>a</b>\n- [x](javascript:ran=1)": "<ul><li><b>a</b></li><li>[x](javascript:ran=1)</li></ul>",
    "``` \"onclick='ran=1'>\na\n```": "<pre><code>a</code></pre>",
    '[<img src=x onerror=ran=1>](https://a.example/"onclick="ran=1)': (
        "<p><a href=https://a.example/%22onclick=%22ran=1><img src=x onerror=ran=1></a></p>"
    ),
    "![<svg onload=ran=1>](https://a.example/b.svg)": "<p><a href=https://a.example/b.svg><svg onload=ran=1></a></p>",
    "[a](https://b.example@evil.example/)": "<p><a href=https://b.example@evil.example/>a</a></p>",
    "<a href='https://a.example/b'>": ("<p><a href='<a href=https://a.example/b>https://a.example/b</a>'></p>"),
    "[https://a.example](https://b.example)": "<p><a href=https://b.example/>https://a.example</a></p>",
    "|<script>|b|\n|-|-|\n|ran=1|</script>|": (
        "<table><thead><tr><th class=start><script></th><th class=start>b</th></tr></thead><tbody><tr>"
        "<td class=start>ran=1</td><td class=start></script></td></tr></tbody></table>"
    ),
}
"""What becomes something, and no more than this."""

HUGE = (
    "> " * DEEP + "a",
    "\n".join("  " * depth + "- a" for depth in range(500)),
    "*a " * DEEP + "*" * DEEP,
    "**a" * DEEP + "**" * DEEP,
    "[a](https://b.example " * DEEP,
    "|a|b|\n|-|-|\n" + "|c|d|\n" * DEEP,
    "- " * DEEP,
    "```\n" * DEEP,
)
"""Whose work must stay small, and whose elements must not stand too deep."""

TAGS = ("p", "div", "span", "em", "strong", "s", "code", "pre", "a", "ul", "ol", "li", "blockquote", "hr", "button")
MORE_TAGS = ("h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td")


def evaluated(page: Page, program: str, *given: Any) -> Any:
    """What the body of an asynchronous function gives, with `given` and what OUTLINE has."""
    return page.evaluate(f"async (given) => {{ {OUTLINE} {program} }}", list(given))


def outlines(page: Page, texts: Sequence[str]) -> list[str]:
    found: list[str] = page.evaluate(f"async (given) => {{ {OUTLINES} }}", list(texts))
    return found


def test_what_becomes_what(chat: Page) -> None:
    assert dict(zip(BECOMES, outlines(chat, list(BECOMES)), strict=True)) == BECOMES


def test_hostile_replies_become_no_more_than_they_may(chat: Page) -> None:
    assert len(STAYS) + len(OTHERWISE) >= 40
    for text, outline in zip(STAYS, outlines(chat, STAYS), strict=True):
        assert outline == f"<p>{text}</p>", text[:80]
    assert dict(zip(OTHERWISE, outlines(chat, list(OTHERWISE)), strict=True)) == OTHERWISE


def test_what_is_huge_stays_shallow(chat: Page) -> None:
    found = evaluated(
        chat,
        """
        return given.map((text) => {
          const shown = shownBy([text]);
          shown.draw(true);
          const depth = (node) => (node === shown.element ? 0 : 1 + depth(node.parentNode));
          const deepest = Math.max(...[...shown.element.querySelectorAll("*:empty, span")].slice(-2000).map(depth));
          return [deepest, shown.element.textContent.replace(/[^a-d]/g, "").length];
        });""",
        *HUGE,
    )
    for text, (deepest, letters) in zip(HUGE, found, strict=True):
        assert deepest < 60, text[:20]
        if "a" in text and "example" not in text:
            assert letters == sum(text.count(letter) for letter in "abcd"), text[:20]


def test_hostile_replies_on_the_page_itself(chat: Page) -> None:
    """All at once, as the server would send them; the browser's window looks for what ran."""
    texts = [text for text in (*STAYS, *OTHERWISE) if len(text) < 1000]
    stubbed(chat, [part for text in texts for part in (text[:5], text[5:], "\n\n```\n```\n\n")])
    send(chat)
    finished(chat)
    last(chat).get_by_text("Pieces", exact=True).click()
    tags = chat.evaluate("[...document.querySelectorAll('.reply *')].map((element) => element.localName)")
    assert set(tags) <= {*TAGS, *MORE_TAGS}
    links = chat.evaluate("[...document.querySelectorAll('.reply a')].map((a) => [a.protocol, a.rel, a.target])")
    assert len(links) > 3
    assert {tuple(link) for link in links} == {("https:", "noopener noreferrer", "_blank")}
    handlers = "[...document.querySelectorAll('.reply *')].flatMap((e) => e.getAttributeNames())"
    assert not [name for name in chat.evaluate(handlers) if name.startswith("on")]


def test_a_reply_that_grows_is_at_each_moment_what_it_is_at_once(chat: Page) -> None:
    """After every character; what more text cannot change stays the same elements."""
    text = "\n\n".join(BECOMES)
    differ, replaced = evaluated(
        chat,
        """
        const [grown, differ] = [shownBy([]), []];
        const first = [];
        for (let end = 1; end <= given[0].length; end++) {
          grown.add({ text: given[0][end - 1], member: end % 2, shares: [1 - (end % 2), end % 2], probability: 1 });
          grown.draw(true);
          const whole = shownBy([given[0].slice(0, end)]);
          whole.draw(true);
          if (outline(grown.element) !== outline(whole.element)) differ.push(given[0].slice(0, end).slice(-40));
          const blocks = [...grown.element.children].slice(0, -1);
          blocks.forEach((block, index) => (first[index] ??= block));
        }
        grown.draw(true, true);
        return [differ, first.filter((block, index) => grown.element.children[index] !== block).length];""",
        text,
    )
    assert differ == []
    assert replaced == 0


def test_a_block_has_the_direction_of_its_first_letter(chat: Page) -> None:
    stubbed(chat, ["1. אב\n\n", "- *ab* אב\n\n", "(ابت)"])
    send(chat)
    finished(chat)
    directions = chat.evaluate("[...document.querySelectorAll('.block')].map((e) => getComputedStyle(e).direction)")
    assert directions == ["rtl", "ltr", "rtl"]


def test_a_long_reply_changes_few_elements(chat: Page) -> None:
    """A paragraph of 3,000 words: each is added, and none is taken away."""
    added, removed = evaluated(
        chat,
        """
        const [shown, counts] = [shownBy([]), { added: 0, removed: 0 }];
        const observer = new MutationObserver((records) => {
          for (const { target, addedNodes, removedNodes } of records) {
            if (target.closest(".who") || [...addedNodes].some((node) => node.closest?.(".who"))) continue;
            counts.added += addedNodes.length;
            counts.removed += removedNodes.length;
          }
        });
        observer.observe(shown.element, { childList: true, subtree: true });
        for (let word = 0; word < 3000; word++) {
          shown.add({ text: `word${word} `, member: 0, shares: [1, 0], probability: 1 });
          if (word % 10 === 0) shown.draw(true);
        }
        shown.draw(true, true);
        await null;
        return [counts.added, counts.removed];""",
    )
    assert (added, removed) == (3000, 0)
