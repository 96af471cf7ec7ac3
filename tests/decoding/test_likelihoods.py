"""Likelihoods against a slow computation: each token by a fresh evaluation, all sums in plain Python."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import logits_of

from me_local import Ensemble, InputError, Message, RunError, load
from me_local.arrays import LogitArray
from me_local.asking import Prompts, make_request
from me_local.config import Overrides, override
from me_local.decoding.generation import Generation
from me_local.decoding.likelihoods import OUTPUTS, mixed
from me_local.llama.batch import Part
from me_local.llama.member import Member

OpenEnsemble = Callable[..., Ensemble]
OpenMember = Callable[..., Member]
WriteModels = Callable[..., Path]

PROMPT, TEXT = "the cat sat", " on the mat,\n and then 12 dogs ran"
SETTINGS = 'type_k = "f32"\ntype_v = "f32"'


def probabilities(member: Member, ids: list[int]) -> dict[int, float]:
    """The next token's, at temperature 1, of those that may be sampled."""
    member.forget()
    logits = logits_of(member, np.array(ids, dtype=np.int32)).astype(float)
    v = member.vocabulary
    may = [i for i in range(v.size) if i in v.end_ids or (v.pieces[i] and i not in v.removed)]
    top = max(logits[i] for i in may)
    total = math.fsum(math.exp(logits[i] - top) for i in may)
    return {i: math.exp(logits[i] - top) / total for i in may}


def opening(member: Member, p: dict[int, float]) -> float:
    """The probability that a word is over."""
    v = member.vocabulary
    return math.fsum(x for i, x in p.items() if i in v.end_ids or re.match(rb"[ \t\n\r\x0b\x0c]", v.pieces[i]))


def slow_words(member: Member, prompt: str, words: list[str]) -> list[float]:
    """P_i(word) of each word by the definition. The words must begin and end where tokens do."""
    v = member.vocabulary
    front = [] if v.bos is None else [v.bos]
    before, found = prompt.encode(), []
    for i, word in enumerate(words):
        ids = front + v.encode(before, at_start=True)
        longer = front + v.encode(before + word.encode(), at_start=True)
        assert longer[: len(ids)] == ids
        steps = [probabilities(member, longer[:n]) for n in range(len(ids), len(longer) + 1)]
        value = math.prod(p[longer[len(ids) + n]] for n, p in enumerate(steps[:-1]))
        if i > 0:
            value /= opening(member, steps[0])
        if i < len(words) - 1:
            value *= opening(member, steps[-1])
        found.append(value)
        before += word.encode()
    return found


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("bpe_a", "spm"), (0.3, 0.7)),
        (("bpe_c", "swa", "bpe_b"), (0.5, 0.2, 0.3)),
        (("recurrent", "hybrid"), (0.6, 0.4)),
    ],
)
def test_words_against_the_definition(
    open_ensemble: OpenEnsemble, open_member: OpenMember, names: tuple[str, ...], weights: tuple[float, ...]
) -> None:
    ensemble = open_ensemble(*names, weights=weights, member=SETTINGS)
    words = [" on", " the", " mat,", "\n and", " then", " 12", " dogs", " ran"]
    assert "".join(words) == TEXT
    per_member = [slow_words(open_member(name, type_k="f32", type_v="f32"), PROMPT, words) for name in names]
    expected = [
        math.log(math.fsum(w * p for w, p in zip(weights, column, strict=True)))
        for column in zip(*per_member, strict=True)
    ]
    score = ensemble.score(PROMPT, TEXT, raw=True)
    assert score.log_likelihood == pytest.approx(math.fsum(expected), abs=1e-3)
    for found, values in zip(score.members, per_member, strict=True):
        assert found == pytest.approx(math.fsum(map(math.log, values)), abs=1e-3)
    assert score.size == len(TEXT)
    assert score.bits_per_byte == pytest.approx(-math.fsum(expected) / math.log(2) / len(TEXT), abs=1e-4)


def test_a_member_has_the_usual_likelihood(open_ensemble: OpenEnsemble, open_member: OpenMember) -> None:
    """Openings cancel: the product over all tokens is left."""
    ensemble = open_ensemble("spm", "bpe_a", member=SETTINGS)
    member = open_member("spm", type_k="f32", type_v="f32")
    v = member.vocabulary
    ids = [*([] if v.bos is None else [v.bos]), *v.encode((PROMPT + TEXT).encode(), at_start=True)]
    begin = len(ids) - len(v.encode(TEXT.encode()))
    slow = math.fsum(math.log(probabilities(member, ids[:n])[ids[n]]) for n in range(begin, len(ids)))
    assert ensemble.score(PROMPT, TEXT, raw=True).members[0] == pytest.approx(slow, abs=1e-3)


def test_with_one_vocabulary_it_is_the_product_of_the_mixtures_of_ce(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "bpe_b", weights=(0.25, 0.75), member=SETTINGS)
    v = ensemble.members[0].vocabulary
    config = override(ensemble.config, Overrides(strategy="ce", temperature=1.0, top_k=0, seed=1))
    ids = v.encode((PROMPT + TEXT).encode(), at_start=True)
    begin = len(v.encode(PROMPT.encode(), at_start=True))
    expected = 0.0
    for n in range(begin, len(ids)):
        head = v.joined(ids[:n])
        assert v.encode(head, at_start=True) == ids[:n]
        prompts = tuple(writer.raw_prompt() for writer in ensemble.writers)
        generation = Generation(ensemble.engine, make_request(config, Prompts(head, prompts)), lambda: False)
        expected += math.log(generation.mixture().of(ids[n] + 1))
    assert ensemble.score(PROMPT, TEXT, raw=True).log_likelihood == pytest.approx(expected, abs=1e-3)


def test_all_next_tokens_together_have_probability_1(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "bpe_b", weights=(0.25, 0.75), member=SETTINGS)
    v = ensemble.members[0].vocabulary
    whole = {
        token: piece.decode()
        for token, piece in enumerate(v.pieces)
        if piece.isascii()
        and piece
        and v.encode(b"the cat" + piece, at_start=True) == [*v.encode(b"the cat", at_start=True), token]
    }
    found = {token: math.exp(ensemble.score("the cat", text, raw=True).log_likelihood) for token, text in whole.items()}
    config = override(ensemble.config, Overrides(strategy="ce", temperature=1.0, top_k=0, seed=1))
    prompts = tuple(writer.raw_prompt() for writer in ensemble.writers)
    mixture = Generation(ensemble.engine, make_request(config, Prompts(b"the cat", prompts)), lambda: False).mixture()
    others = [
        p for n, p in zip(mixture.numbers.tolist(), mixture.probabilities.tolist(), strict=True) if n - 1 not in whole
    ]
    assert len(whole) > 100
    assert math.fsum(found.values()) + math.fsum(others) == pytest.approx(1, abs=1e-4)


def test_a_reply_stands_behind_the_chat_template(open_ensemble: OpenEnsemble, open_member: OpenMember) -> None:
    ensemble = open_ensemble("bpe_a", member=SETTINGS)
    member = open_member("bpe_a", type_k="f32", type_v="f32")
    prompt = ensemble.writers[0].prompt([Message("user", "Hello")]).tolist()
    ids = [*prompt, *member.vocabulary.encode(b"the cat")]
    slow = math.fsum(math.log(probabilities(member, ids[:n])[ids[n]]) for n in range(len(prompt), len(ids)))
    assert ensemble.score("Hello", "the cat").log_likelihood == pytest.approx(slow, abs=1e-3)
    assert ensemble.score([Message("user", "Hello")], "the cat").log_likelihood == pytest.approx(slow, abs=1e-3)


def test_a_router_weighs_each_word(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm", weights=(0.5, 0.5))
    ensemble.engine.router = lambda text, weights: np.array([1.0, 0.0] if text.endswith(b"on") else [0.0, 1.0])
    passage = ensemble.passage("the cat sat", " on the mat", raw=True)
    units = ensemble.unit_scores(passage).log_probabilities
    assert units.shape == (2, 3)
    expected = units[1, 0] + units[0, 1] + units[1, 2]
    assert ensemble.score("the cat sat", " on the mat", raw=True).log_likelihood == pytest.approx(expected)


def test_choices_share_their_prompt_and_change_nothing(
    open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    prompt = "the cat sat on the mat and the dog ran to the house " * 2
    first = ensemble.score(prompt, "again today", raw=True)
    sizes, decode = [], Member._decode

    def counting(self: Member, parts: Sequence[Part]) -> int:
        sizes.extend(len(ids) for _, ids, _ in parts)
        return decode(self, parts)

    monkeypatch.setattr(Member, "_decode", counting)
    other = ensemble.score(prompt, "and then", raw=True)
    assert sum(sizes) < 40  # for a prompt of more than 100 bytes
    assert ensemble.score(prompt, "again today", raw=True) == first
    ensemble.score("something else", " entirely", raw=True)
    assert ensemble.score(prompt, "again today", raw=True) == first
    assert ensemble.score(prompt, "and then", raw=True) == other


def test_more_tokens_than_an_evaluation_has_outputs(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", member=SETTINGS)
    text = " the cat sat on the mat" * 16
    score = ensemble.score("so", text, raw=True)
    v = ensemble.members[0].vocabulary
    assert len(v.encode(text.encode())) > 2 * OUTPUTS
    half = len(text) // 2
    parts = [ensemble.score("so", text[:half], raw=True), ensemble.score("so" + text[:half], text[half:], raw=True)]
    assert score.log_likelihood == pytest.approx(sum(part.log_likelihood for part in parts), abs=1e-3)


def test_scoring_leaves_replies_as_they_are(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    before = ensemble.generate("the cat", Overrides(seed=3, max_tokens=20), raw=True).text
    ensemble.score("the cat", " sat", raw=True)
    assert ensemble.generate("the cat", Overrides(seed=3, max_tokens=20), raw=True).text == before


def test_what_cannot_be_scored_is_refused(open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    for prompt, text, message in (
        ("", "x", "the prompt is empty"),
        ("x", "", "the continuation is empty"),
        ("x", "\ud800", "half a surrogate pair"),
        ("the cat", " the" * 600, r'tokens for member "bpe_a", which exceeds the available context size of 512'),
        ("th", "e", 'member "bpe_a" has nothing in front of the text to score: give a longer prompt'),
    ):
        with pytest.raises(InputError, match=message):
            ensemble.score(prompt, text, raw=True)


def test_a_closed_ensemble_scores_nothing(write_models: WriteModels) -> None:
    with load(write_models("bpe_a", "spm")) as ensemble:
        ensemble.score("the cat", " sat", raw=True)
    with pytest.raises(RunError, match="the ensemble is closed"):
        ensemble.score("the cat", " sat", raw=True)


def test_logits_that_are_no_numbers_are_an_error(open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Member.whole_row

    def spoilt(self: Member, index: int) -> LogitArray:
        logits = row(self, index).copy()
        logits[7] = np.nan
        return logits

    monkeypatch.setattr(Member, "whole_row", spoilt)
    with pytest.raises(RunError, match='member "bpe_a": NaN or infinite logits'):
        open_ensemble("bpe_a").score("the cat", " sat", raw=True)


def test_an_evaluation_that_fails_names_member_and_tokens(
    open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = open_ensemble("bpe_a", "spm")
    before = ensemble.score("the cat", " sat", raw=True)
    with monkeypatch.context() as patch:
        patch.setattr(Member, "_decode", lambda *_: 1)
        with pytest.raises(RunError, match=r'member "bpe_a", tokens \d+ to \d+: no room is left in its KV cache'):
            ensemble.score("the cat", " ran", raw=True)
    assert ensemble.score("the cat", " sat", raw=True) == before


def test_a_word_that_hardly_ever_ends(open_ensemble: OpenEnsemble, monkeypatch: pytest.MonkeyPatch) -> None:
    """White space of a probability below the smallest float does no harm: openings cancel for a member alone."""
    row = Member.whole_row

    def spaceless(self: Member, index: int) -> LogitArray:
        logits = row(self, index).copy()
        logits[[piece[:1].isspace() or not piece for piece in self.vocabulary.pieces]] -= 500
        return logits

    monkeypatch.setattr(Member, "whole_row", spaceless)
    score = open_ensemble("bpe_a", "spm").score("the cat", " sat on", raw=True)
    assert all(-2000 < value < -900 for value in (score.log_likelihood, *score.members))


def test_mixing() -> None:
    logs = np.log(np.array([[0.5, 0.2], [0.1, 0.0 + 1e-300]]))
    np.testing.assert_allclose(np.exp(mixed(logs, np.array([[0.25], [0.75]]))), [0.2, 0.05])
    np.testing.assert_allclose(np.exp(mixed(logs, np.array([[0.0, 1.0], [1.0, 0.0]]))), [0.1, 0.2])
    far = mixed(np.array([[-2000.0], [-2001.0]]), np.array([[0.5], [0.5]]))
    np.testing.assert_allclose(far, [-2000 + math.log(0.5 + 0.5 * math.exp(-1))])
    assert mixed(np.array([[-np.inf], [-np.inf]]), np.array([[0.5], [0.5]])) == [-np.inf]
