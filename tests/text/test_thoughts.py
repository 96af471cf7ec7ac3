"""Thoughts and answers, however a reply comes in; where prompts open one; and control tokens that are written."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from me_local.text.thoughts import KINDS, Kind, Thoughts, is_written, opened, parted

ANALYSIS, FINAL, NEXT = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "<|end|><|start|>assistant"

REPLIES = [
    ("<think>\nI see. \n</think>\n\nHello <think> x", "I see.", "Hello <think> x"),
    ("  plain", "", "  plain"),
    ("<thin air", "", "<thin air"),
    ("<think>abc", "abc", ""),
    ("<think>abc </thi", "abc </thi", ""),
    ("<think></think>x", "", "x"),
    ("<think>a</think> \n ", "a", ""),
    (f"{ANALYSIS}Let's.{NEXT}{FINAL}Hi", "Let's.", "Hi"),
    (f"{FINAL}Hi", "", "Hi"),
    (f"{ANALYSIS}A{NEXT}{ANALYSIS}B{NEXT}{FINAL}Hi", "A\n\nB", "Hi"),
    ("<think>a</think><response>b</response>", "a", "b"),
    ("<think>a</think>b < c </response", "a", "b < c </response"),
    ("[THINK] a b\n\nc[/THINK] yes", "a b\n\nc", "yes"),
    ("<|channel>thought\nhm<channel|>yes", "hm", "yes"),
    ("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>", "hm", "yes"),
    ("Here are my reasoning steps:\nhm\n[BEGIN FINAL RESPONSE]\nyes", "hm", "yes"),
    ("\n", "", "\n"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "thought", "answer"), REPLIES)
def test_a_reply_is_parted_wherever_it_is_cut(text: str, thought: str, answer: str) -> None:
    assert parted(text, KINDS) == (thought, answer)
    for seed in range(100):
        random_ = random.Random(seed)
        thoughts, at = Thoughts(KINDS), 0
        found = ["", ""]
        while at < len(text):
            size = random_.randint(1, 6)
            added = thoughts.add(text[at : at + size])
            found = [found[0] + added.thought, found[1] + added.answer]
            assert thought.startswith(found[0])
            assert answer.startswith(found[1])
            at += size
        last = thoughts.end()
        assert [found[0] + last.thought, found[1] + last.answer] == [thought, answer]


@given(st.text(alphabet="<think>/ \nab"), st.integers(1, 5))
def test_no_text_is_lost_or_written_twice(text: str, size: int) -> None:
    kinds = KINDS[:1]
    thoughts = Thoughts(kinds)
    added = [thoughts.add(text[i : i + size]) for i in range(0, len(text), size)] + [thoughts.end()]
    together = "".join(part.thought for part in added), "".join(part.answer for part in added)
    assert together == parted(text, kinds)
    if not text.lstrip().startswith("<think>"):
        assert together[0] == ""
    if "<" not in text:
        assert together == ("", text)


def test_without_kinds_all_is_the_answer() -> None:
    assert parted("<think>a</think>b", ()) == ("", "<think>a</think>b")


def test_behind_a_head() -> None:
    thoughts = Thoughts(KINDS, "<think>\n")
    assert thoughts.closing == "</think>"
    assert thoughts.add("\n hm</think>") == ("hm", "")
    assert thoughts.closing == ""
    assert thoughts.add(" yes") == ("", "yes")
    assert parted("and so on", KINDS, "<think>a</think>It is") == ("", "and so on")
    assert Thoughts(KINDS, "It is").closing == ""


@pytest.mark.parametrize(
    ("prompt", "at"),
    [
        ("<|im_start|>assistant\n<think>\n", 22),
        ("<|im_start|>assistant\n<think>", 22),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None),
        ("[/INST][THINK]", 7),
        ("<think>", 0),
        ("", None),
        (f"<|start|>assistant{ANALYSIS}", 0),
        (f"<|start|>x{ANALYSIS}", 10),
    ],
)
def test_where_a_prompt_opens_a_thought(prompt: str, at: int | None) -> None:
    assert opened(prompt) == at


def test_which_control_tokens_are_written() -> None:
    assert is_written("[THINK]", [b"a"])
    assert not is_written("[INST]", [b"a"])
    assert not is_written("<|end|>", [b"a"])
    assert is_written("<|end|>", [b"a", b"<|channel|>"])


def test_which_kinds_a_template_or_a_vocabulary_has() -> None:
    def kinds(template: str, *control: str) -> list[Kind]:
        return [kind for kind in KINDS if kind.stands_in(template, control)]

    assert kinds("{{ content.split('</think>')[-1] }}") == [KINDS[0]]
    assert kinds("", "[THINK]") == [KINDS[1]]
    assert kinds("<|im_start|>", "<|im_end|>") == []
