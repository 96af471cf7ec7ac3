"""The demo ensemble: two real models with different vocabularies, as a new user meets them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pexpect
import pytest
from click.testing import CliRunner
from conftest import logits_of
from terminals import ask, spawn

from me_local import Chat, Ensemble, Message, Overrides, load
from me_local.cli.program import main
from me_local.measuring.guesses import REPEATED

pytestmark = pytest.mark.demo
MODELS = Path(__file__).parents[1] / "models.toml"
PROMPT = "The history of the Roman Empire begins with"


@pytest.fixture(scope="module")
def ensemble() -> Iterator[Ensemble]:
    with load(MODELS) as loaded:
        yield loaded


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_completion_is_the_same_twice_and_both_members_write(strategy: str) -> None:
    arguments = ["generate", "--models", str(MODELS), "--strategy", strategy, "--seed", "1", "--raw", PROMPT]
    texts = []
    for _ in range(2):
        result = CliRunner().invoke(main, [*arguments, "--max-tokens", "60", "--json"])
        assert result.exit_code == 0, result.stderr
        record = json.loads(result.stdout)
        texts.append(record["text"])
        assert {piece["member"] for piece in record["pieces"]} == {"smollm2", "gemma"}
    assert texts[0] == texts[1]
    # Fluent: words of a language, not of a broken tokeniser.
    words = re.findall(r"[A-Za-z']+", texts[0])
    assert len(words) >= 25
    assert sum(word.lower() in COMMON for word in words) >= 0.25 * len(words)


@pytest.mark.slow
def test_a_seed_gives_the_same_reply_again_with_guesses(ensemble: Ensemble) -> None:
    """Bit by bit, also in quantised models, whatever the caches held in between."""
    settings = Overrides(seed=2, max_tokens=60, repeat_penalty=1.0, draft="ngram")
    first = ensemble.generate(REPEATED.prompt, settings, raw=True)
    ensemble.generate("Something else", Overrides(seed=1, max_tokens=5))
    assert ensemble.generate(REPEATED.prompt, settings, raw=True).steps == first.steps
    assert first.guessed > 10


def test_the_right_continuation_is_the_likeliest(ensemble: Ensemble) -> None:
    texts = [" Paris", " Rome", " the cat", "Paris"]
    scores = {text: ensemble.score("The capital of France is", text, raw=True) for text in texts}
    assert max(texts, key=lambda text: scores[text].log_likelihood) == " Paris"
    for member in range(2):
        assert max(texts, key=lambda text: scores[text].members[member]) == " Paris"
    paris = scores[" Paris"]
    # One word: the mixture lies between its members, 0.7 and 0.3 of them.
    mixture = np.log(0.7 * np.exp(paris.members[0]) + 0.3 * np.exp(paris.members[1]))
    assert paris.log_likelihood == pytest.approx(mixture)
    assert ensemble.score("The capital of France is", " Paris", raw=True) == paris


COMMON = {
    "the",
    "of",
    "and",
    "a",
    "in",
    "to",
    "was",
    "is",
    "it",
    "that",
    "by",
    "with",
    "for",
    "as",
    "an",
    "on",
    "his",
    "its",
}


@pytest.mark.slow
def test_the_context_of_each_step_is_canonical(ensemble: Ensemble) -> None:
    stream = ensemble.stream(PROMPT, Overrides(seed=3, max_tokens=80), raw=True)
    for _ in stream:
        text = stream._draft.generation.text
        for member, context in zip(ensemble.members, stream._draft.generation._contexts, strict=True):
            assert context.ids(text).tolist() == member.vocabulary.encode(text, at_start=True)


def test_a_synced_cache_predicts_like_a_fresh_one(ensemble: Ensemble) -> None:
    """In total variation: the kernels for one token and for many differ by about 0.03, a wrong context by far more."""
    ids = np.array(ensemble.members[1].vocabulary.encode(PROMPT.encode()) * 8, dtype=np.int32)
    member = ensemble.members[1]
    for length in (40, 43, 44, 50):
        synced = softmax(logits_of(member, ids[:length]))
    member.forget()
    fresh = softmax(logits_of(member, ids[:50]))
    member.forget()
    shifted = softmax(logits_of(member, ids[1:50]))
    assert np.abs(synced - fresh).sum() / 2 < 0.15
    assert np.abs(synced - fresh).sum() < np.abs(synced - shifted).sum()


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits.astype(np.float64) - logits.max())
    return odds / odds.sum()


def test_control_tokens_in_a_message_stay_text(ensemble: Ensemble) -> None:
    text = "What do <|im_end|>, <|im_start|>system, <start_of_turn>, <end_of_turn>, <eos> and </s> mean?"
    said = [Message("user", text)]
    harmless = [Message("user", "What?")]
    pairs = zip(
        ensemble.prompter.prompts(said, ensemble.config).ids,
        ensemble.prompter.prompts(harmless, ensemble.config).ids,
        strict=True,
    )
    for member, (prompt, plain) in zip(ensemble.members, pairs, strict=True):
        control = set(member.vocabulary.control.values())
        assert [i for i in prompt.tolist() if i in control] == [i for i in plain.tolist() if i in control]
        assert text.encode() in member.vocabulary.joined(prompt.tolist())


@pytest.mark.slow
def test_a_turn_evaluates_only_what_is_new(ensemble: Ensemble) -> None:
    chat = Chat(ensemble)
    chat.set(Overrides(seed=1, max_tokens=40))
    chat.say("Hello, who are you?").finish()
    chat.say("What is the capital of France?").finish()
    reply = chat.say("And of Italy?").finish()
    for usage in reply.usage:
        assert usage.prompt_length > 80
        # The question with its template, and what of the last reply this member had not seen.
        assert usage.prompt_evaluated < 60


@pytest.mark.slow
def test_three_turns_on_a_terminal_with_ctrl_c_in_the_second(tmp_path: Path) -> None:
    child = spawn(["chat", "--models", str(MODELS), "--seed", "2", "--max-tokens", "80", "--top-k", "3"], tmp_path)
    ask(child, "Tell me about the sea.")
    child.expect("seed 2")
    ask(child, "/set max_tokens 400")
    ask(child, "/set ignore_eos true")
    ask(child, "Write a long story about a ship.")
    child.expect(r"(?s)\x1b\[3[36]m.{150}")
    child.sendintr()
    child.expect("cancelled, seed 3")
    ask(child, "/set max_tokens 20")
    ask(child, "/set ignore_eos false")
    ask(child, "Thank you!")
    child.expect(r"tokens new\+cached: smollm2 (\d+)\+(\d+), gemma (\d+)\+(\d+)")
    new_a, cached_a, new_b, cached_b = map(int, child.match.groups())
    assert max(new_a, new_b) < 40
    assert min(cached_a, cached_b) > 100
    child.expect("seed 4")
    ask(child, "/exit")
    child.expect(pexpect.EOF)


@pytest.mark.slow
def test_a_reply_does_not_depend_on_what_was_asked_before(ensemble: Ensemble) -> None:
    """Where batches were cut otherwise, the quantised models' numbers differ enough to change a reply."""
    settings = Overrides(seed=1, max_tokens=40)
    ensemble.generate("Tell me about cats.", settings)
    fresh = ensemble.generate("Tell me about dogs.", settings)
    ensemble.generate("Tell me about dogs and cats and birds.", settings)
    assert ensemble.generate("Tell me about dogs.", settings).text == fresh.text
