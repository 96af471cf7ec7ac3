"""Conversations on tiny models: what a turn evaluates, what a full context drops, saving and restoring."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from me_local import Chat, ConfigError, Ensemble, InputError, Message, Overrides, RunError
from me_local.chat import Aside
from me_local.config import Constraint

OpenEnsemble = Callable[..., Ensemble]


def test_a_turn_evaluates_only_what_is_new(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a", "spm"))
    characters = Constraint("regex", "[ a-z]{200}")  # bytes that are none would not stand in the next prompt
    chat.set(Overrides(max_tokens=25, strategy="ce", seed=1, constraint=characters))
    before = chat.say("Hello there").finish()
    for text in ("the cat", "and the dog", "12 times"):
        reply = chat.say(text).finish()
        for old, new, member in zip(before.usage, reply.usage, chat.ensemble.members, strict=True):
            said = len(member.vocabulary.encode(before.text.encode()))
            # What the cache held: the prompt before and its reply, whose last tokens may merge with what follows.
            assert new.prompt_length - new.prompt_evaluated >= old.prompt_length + said - 4
            assert new.prompt_evaluated < 40
        before = reply


def test_a_conversation_grows_by_message_and_reply(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a", "spm"))
    chat.set(Overrides(max_tokens=8, seed=5))
    first = chat.say("Hello").finish()
    second = chat.say("Again").finish()
    assert [m.content for m in chat.messages] == ["Hello", first.text, "Again", second.text]
    assert (first.seed, second.seed) == (5, 6)


def test_another_reply_takes_the_place_of_the_last(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a", "spm"))
    chat.set(Overrides(max_tokens=12, seed=5))
    with pytest.raises(InputError, match="no message yet"):
        chat.again()
    first = chat.say("Hello").finish()
    second = chat.again().finish()
    assert first.text != second.text
    assert [m.content for m in chat.messages] == ["Hello", second.text]


def test_a_cancelled_reply_stays_in_the_conversation(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a", "spm"))
    chat.set(Overrides(max_tokens=100, seed=5))
    turn = chat.say("Hello")
    next(turn)
    next(turn)
    turn.cancel()
    reply = turn.finish()
    assert reply.finish_reason == "cancelled"
    assert [m.content for m in chat.messages] == ["Hello", reply.text]


def test_a_failed_reply_leaves_the_chat_usable(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a"))
    chat.set(Overrides(max_tokens=10, seed=5))
    member = chat.ensemble.members[0]
    decode, member._decode = member._decode, _fail
    with pytest.raises(RunError):
        chat.say("Hello").finish()
    member._decode = decode
    assert chat.messages == []
    assert chat.say("Hello").finish().text
    assert len(chat.messages) == 2


def _fail(*_: object) -> int:
    return -3


def test_a_full_context_drops_the_oldest_turns_but_not_the_system_message(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a", "spm"))
    chat.set(Overrides(max_tokens=20, seed=5, system="Be brief."))
    dropped = []
    for turn in range(12):
        text = f"number {turn} " + "the cat sat on the mat " * 5
        chat.say(text).finish()
        dropped.append(chat.dropped)
    assert dropped[0] == 0
    assert dropped[-1] > 0
    assert dropped == sorted(dropped)
    assert all(count % 2 == 0 for count in dropped)
    assert len(chat.messages) == 24
    _, prompts = chat._fitting([*chat.messages, Message("user", "x")], chat.config)
    for member, prompt in zip(chat.ensemble.members, prompts.ids, strict=True):
        seen = member.vocabulary.joined(prompt.tolist())
        assert b"Be brief." in seen
        assert b"number 0" not in seen
        assert b"number 11" in seen
        assert len(prompt) + 20 <= member.n_ctx


def test_a_message_that_does_not_fit_is_an_error_and_changes_nothing(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a"))
    chat.set(Overrides(max_tokens=5, seed=5))
    chat.say("Hello").finish()
    before = list(chat.messages)
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens"):
        chat.say("word " * 500)
    assert chat.messages == before


def test_saving_and_restoring(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    chat = Chat(ensemble)
    chat.set(Overrides(max_tokens=10, seed=5, system="Be brief."))
    chat.say("Hello").finish()
    other = Chat(ensemble)
    other.restore(chat.as_dict())
    assert other.messages == chat.messages
    assert other.config.system == "Be brief."


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([], "not a saved conversation"),
        ({"system": 3, "messages": []}, "not a saved conversation"),
        ({"system": None}, '"messages" must be a list'),
        ({"messages": ["x"]}, r"messages\[0\]: must be an object"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\]: must be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]\.role: must be .* got 'robot'"),
    ],
)
def test_files_that_are_no_conversations(open_ensemble: OpenEnsemble, saved: object, message: str) -> None:
    chat = Chat(open_ensemble("bpe_a"))
    chat.messages = [Message("user", "kept")]
    with pytest.raises(InputError, match=message):
        chat.restore(saved)
    assert chat.messages == [Message("user", "kept")]


def test_settings_that_cannot_be(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_a"))
    with pytest.raises(ConfigError, match="argmax"):
        chat.set(Overrides(decode="argmax"))
    with pytest.raises(ConfigError, match='"no such piece" is a token of no member'):
        chat.set(Overrides(logit_bias={"no such piece": -1.0}))
    assert chat.config.decode == "sample"
    assert chat.config.members[0].sampling.logit_bias == ()


def test_a_full_context_is_not_evaluated_again_in_each_turn(open_ensemble: OpenEnsemble) -> None:
    chat = Chat(open_ensemble("bpe_c", "spm"))
    chat.set(Overrides(max_tokens=10, seed=5, strategy="ce"))
    changes = 0
    for turn in range(30):
        before = chat.dropped
        chat.say(f"turn {turn} the cat sat on the mat").finish()
        changes += chat.dropped != before
    assert chat.dropped > 20
    # Each time half of the context is freed, which lasts for several turns.
    assert changes <= 8


def test_a_restored_chat_leaves_the_members_own_system_messages(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm", member='system = "own"')
    chat = Chat(ensemble)
    chat.set(Overrides(max_tokens=3, seed=1))
    chat.say("Hello").finish()
    chat.restore(chat.as_dict())
    assert [member.system for member in chat.config.members] == ["own", "own"]
    with pytest.raises(InputError, match='it belongs into "system"'):
        chat.restore({"messages": [{"role": "system", "content": "x"}]})


def started(ensemble: Ensemble) -> Chat:
    chat = Chat(ensemble)
    chat.set(Overrides(max_tokens=8, seed=5))
    return chat


def test_taking_back_what_was_said_last(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    with pytest.raises(InputError, match="no message yet"):
        chat.undo()
    first = chat.say("Hello").finish()
    second = chat.say("Again").finish()
    assert chat.undo() == "Again"
    assert [m.content for m in chat.messages] == ["Hello", first.text]
    assert chat.aside == [Aside(2, (Message("user", "Again"), Message("assistant", second.text)))]
    third = chat.say("Other").finish()
    assert [m.content for m in chat.messages] == ["Hello", first.text, "Other", third.text]
    assert [turn.messages[1].content for turn in chat.replies()] == [third.text]


def test_another_last_message(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    chat.say("Hello").finish()
    before = list(chat.messages)
    with pytest.raises(InputError, match="empty"):
        chat.edit(" ")
    assert chat.messages == before
    reply = chat.edit("Goodbye").finish()
    assert [m.content for m in chat.messages] == ["Goodbye", reply.text]
    assert chat.aside == [Aside(0, tuple(before))]
    assert len(chat.replies()) == 1  # the other replied to something else


def test_all_replies_to_a_message_can_be_gone_on_with(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    texts = [chat.say("Hello").finish().text, *(chat.again().finish().text for _ in range(2))]
    assert [turn.messages[1].content for turn in chat.replies()] == texts
    for number in (1, 3, 2):
        assert chat.pick(number).content == texts[number - 1]
        assert [m.content for m in chat.messages] == ["Hello", texts[number - 1]]
        assert [turn.messages[1].content for turn in chat.replies()] == texts  # in the order of writing, still
    for number in (0, 4):
        with pytest.raises(InputError, match=f"no reply {number}: the last message has 3"):
            chat.pick(number)
    chat.say("Again").finish()
    assert len(chat.replies()) == 1


def test_a_member_alone_replies_as_it_does_by_itself(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    chat.set(Overrides(temperature=0, strategy="ce"))
    own = chat.say("Hello").finish()
    alone = [chat.alone(member).finish() for member in range(2)]
    for reply, name in zip(alone, ("bpe_a", "spm"), strict=True):
        lone = started(open_ensemble(name))
        lone.set(Overrides(temperature=0))
        assert reply.text == lone.say("Hello").finish().text
        assert {step.member for step in reply.steps} == {name}
    assert [m.content for m in chat.messages] == ["Hello", own.text]
    assert [turn.by for turn in chat.replies()] == ["", "bpe_a", "spm"]
    chat.pick(3)
    assert chat.messages[-1].content == alone[1].text


def test_nothing_is_lost_between_saving_and_restoring(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    chat.say("Hello").finish()
    chat.again().finish()
    chat.alone(1).finish()
    chat.say("Again").finish()
    chat.undo()
    other = Chat(chat.ensemble)
    other.restore(json.loads(json.dumps(chat.all_as_dict())))
    assert other.messages == chat.messages
    assert other.aside == chat.aside
    assert [turn.by for turn in other.replies()] == ["", "", "spm"]
    texts = {m.content for m in chat.messages} | {m.content for turn in chat.aside for m in turn.messages}
    chat.clear()
    other.restore(chat.all_as_dict())
    assert (other.messages, other.dropped) == ([], 0)
    assert texts == {m.content for turn in other.aside for m in turn.messages}
    said = other.say("Third").finish().text
    other.restore({"messages": [{"role": "user", "content": "x"}]})
    assert Aside(0, (Message("user", "Third"), Message("assistant", said))) in other.aside


def test_a_turn_that_is_not_over_can_be_saved(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    turn = chat.say("Hello")
    assert chat.all_as_dict(turn)["messages"] == []
    written = next(turn).text + next(turn).text
    part = chat.all_as_dict(turn)
    assert [m["content"] for m in part["messages"]] == ["Hello", written]
    assert chat.messages == []
    first = turn.finish().text
    turn = chat.again()
    written = next(turn).text
    part = chat.all_as_dict(turn)
    assert [m["content"] for m in part["messages"]] == ["Hello", written]
    assert [entry["messages"][1]["content"] for entry in part["aside"]] == [first, written]
    assert [m.content for m in chat.messages] == ["Hello", first]
    second = turn.finish().text
    assert [entry.messages[1].content for entry in chat.aside] == [first, second]


def test_a_full_context_and_messages_that_are_taken_back(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a"))
    for turn in range(12):
        chat.say(f"number {turn} " + "the cat sat on the mat " * 5).finish()
    assert chat.dropped > 0
    for _ in range(12):
        chat.undo()
    assert chat.messages == []
    assert chat.say("Hello").finish().text
    assert chat.dropped == 0


def test_what_a_member_without_weight_can_see_changes_nothing_for_the_others(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    chat.set(Overrides(weights={"bpe_a": 1.0, "spm": 0.0}))
    for turn in range(2):
        chat.say(f"turn {turn} " + "the cat sat on the mat " * 20).finish()
    assert chat.dropped == 0
    alone = chat.alone(1).finish()
    assert alone.text
    assert alone.usage[1].prompt_length < 300  # it does not see the first turn, which bpe_a has room for
    assert chat.dropped == 0


def test_no_member_alone_where_a_router_decides(open_ensemble: OpenEnsemble) -> None:
    chat = started(open_ensemble("bpe_a", "spm"))
    chat.say("Hello").finish()
    chat.config = replace(chat.config, router="mine")
    with pytest.raises(InputError, match='cannot be asked alone where router = "mine"'):
        chat.alone(0)
