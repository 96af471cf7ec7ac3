"""Faults of a reply in the making: a clear error or a clean end, what was written is kept, the next reply is as ever.

"As ever" is exact: the next reply's pieces and probabilities equal those of an ensemble that was just loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from selection import slow_but

from me_local import Ensemble, InputError, Overrides, RunError
from me_local.arrays import FloatArray, LogitArray
from me_local.decoding.reply import Reply, Step
from me_local.llama.member import Member

OpenEnsemble = Callable[..., Ensemble]
Plant = Callable[[Ensemble, pytest.MonkeyPatch], None]

ENSEMBLES = [("bpe_a", "spm"), ("hybrid", "recurrent")]
STRATEGIES = ["me", "ce"]
PROMPT = "Hello there"
AFTER = Overrides(seed=77, max_tokens=25)


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in the second member or around it, and what the error says."""

    plant: Plant
    error: str


def failing_decode(code: int, call: int, *, decoded: bool) -> Plant:
    """The call-th evaluation answers with a code, without having done anything or after having decoded."""

    def plant(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
        member, calls = ensemble.members[1], iter(range(1, 10**6))
        decode = member._decode

        def failing(*args: object) -> int:
            fails = next(calls) == call
            answer = decode(*args) if decoded or not fails else code
            return code if fails else answer

        patch.setattr(member, "_decode", failing)

    return plant


def changed_logits(change: Callable[[Member, LogitArray], None], call: int) -> Plant:
    """From the call-th prediction on, the second member's logits are changed."""

    def plant(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
        member, calls = ensemble.members[1], iter(range(1, 10**6))
        read = member.logits

        def changed() -> LogitArray:
            logits = read()
            if next(calls) >= call:
                change(member, logits)
            return logits

        patch.setattr(member, "logits", changed)

    return plant


def filled(value: float, part: slice) -> Callable[[Member, LogitArray], None]:
    def change(member: Member, logits: LogitArray) -> None:
        logits[part] = value

    return change


def no_weights(ensemble: Ensemble, patch: pytest.MonkeyPatch) -> None:
    """A router that gives nobody a weight after eight bytes of text."""

    def router(text: bytes, weights: FloatArray) -> FloatArray:
        return weights * (len(text) < 8)

    patch.setattr(ensemble.engine, "router", router)


CODES = {
    1: "no room is left in its KV cache",
    2: "the evaluation was aborted",
    -1: "llama.cpp calls the batch invalid",
    -3: "llama.cpp failed with code -3",
}
LOGITS = {
    "NaN": (filled(np.nan, slice(7, 8)), "NaN or infinite logits"),
    "NaN everywhere": (filled(np.nan, slice(None)), "NaN or infinite logits"),
    "infinite": (filled(np.inf, slice(200, 201)), "NaN or infinite logits"),
    "minus infinite everywhere": (filled(-np.inf, slice(None)), "no token that may be sampled has a finite logit"),
}
FAULTS = {
    f"decode code {code} at {moment}{' once decoded' * decoded}": Fault(
        failing_decode(code, call, decoded=decoded), rf'^member "{{}}", tokens \d+ to \d+: {message}$'
    )
    for code, message in CODES.items()
    for moment, call in (("the prompt", 1), ("a piece", 5))
    for decoded in (False, True)
}
FAULTS |= {
    f"logits {name}": Fault(changed_logits(change, 3), rf'^member "{{}}", after \d+ bytes of text: {message}$')
    for name, (change, message) in LOGITS.items()
}
FAULTS["no weights"] = Fault(
    no_weights, r"^no member with a weight above 0 can write the next piece after \d+ bytes of text$"
)


def long_reply(ensemble: Ensemble, strategy: str) -> tuple[Overrides, Reply]:
    """Settings whose reply is long enough for any fault here, and that reply."""
    for seed in range(200):
        settings = Overrides(seed=seed, max_tokens=40, strategy=strategy)  # type: ignore[arg-type]
        reply = ensemble.generate(PROMPT, settings)
        if len(reply.steps) == 40 and all(usage.calls > 8 for usage in reply.usage):
            return settings, reply
    pytest.fail("no reply was long enough")


def as_ever(ensemble: Ensemble, fresh: Ensemble) -> bool:
    """Whether the next reply is that of an ensemble in which nothing has happened."""
    expected = fresh.generate(PROMPT, AFTER)
    assert len(expected.steps) > 5
    return ensemble.generate(PROMPT, AFTER).steps == expected.steps


def joined(steps: Sequence[Step]) -> bytes:
    return b"".join(step.piece for step in steps)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("names", slow_but(ENSEMBLES, ENSEMBLES[0]))
@pytest.mark.parametrize("name", slow_but(FAULTS, *list(FAULTS)[::5]))
def test_a_reply_that_fails(name: str, names: tuple[str, str], strategy: str, open_ensemble: OpenEnsemble) -> None:
    fault = FAULTS[name]
    settings, whole = long_reply(open_ensemble(*names), strategy)
    ensemble = open_ensemble(*names)
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(ensemble, patch)
        stream = ensemble.stream(PROMPT, settings)
        with pytest.raises(RunError, match=fault.error.format(names[1])):
            stream.finish()
    kept = stream.reply
    assert kept.finish_reason == "error"
    assert kept.steps == whole.steps[: len(kept.steps)]
    if "prompt" not in name:
        assert len(kept.steps) > 1
    assert as_ever(ensemble, open_ensemble(*names))


def test_pieces_that_a_stop_string_held_back_are_kept(open_ensemble: OpenEnsemble) -> None:
    settings, whole = long_reply(open_ensemble("bpe_a", "bpe_c"), "ce")
    ensemble = open_ensemble("bpe_a", "bpe_c")
    held = joined(whole.steps[2:4]).decode("utf-8", "ignore")
    with pytest.MonkeyPatch.context() as patch:
        changed_logits(filled(np.nan, slice(None)), 5)(ensemble, patch)
        stream = ensemble.stream(PROMPT, replace(settings, stop=(held + "\0",)))
        with pytest.raises(RunError):
            stream.finish()
    assert stream.reply.steps == whole.steps[:4]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("names", ENSEMBLES)
def test_a_context_that_fills_up(names: tuple[str, str], strategy: str, open_ensemble: OpenEnsemble) -> None:
    settings, whole = long_reply(open_ensemble(*names), strategy)
    ensemble, fresh = open_ensemble(*names), open_ensemble(*names)
    member = ensemble.members[1]
    member.n_ctx = whole.usage[1].prompt_length + 20
    reply = ensemble.generate(PROMPT, settings)
    assert reply.finish_reason == "length"
    assert reply.steps == whole.steps[: len(reply.steps)]
    # One piece more, and the member's ids of the whole text would not have fitted; before, they did.
    ids = [len(member.vocabulary.encode(joined(whole.steps[:n]))) for n in (len(reply.steps) - 1, len(reply.steps))]
    assert ids[0] <= 20 <= ids[1] + 1
    member.n_ctx = 512
    assert as_ever(ensemble, fresh)


@pytest.mark.parametrize("names", ENSEMBLES)
@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_longer_than_the_context(names: tuple[str, str], raw: bool, open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble(*names)
    ensemble.generate(PROMPT, Overrides(seed=1, max_tokens=5))
    message = rf'^the prompt has \d+ tokens for member "{names[0]}", which exceeds the available context size of 512'
    with pytest.raises(InputError, match=message):
        ensemble.stream("cat " * 900, raw=raw)
    assert as_ever(ensemble, open_ensemble(*names))


@pytest.mark.parametrize("names", ENSEMBLES)
def test_no_tokens_at_all(names: tuple[str, str], open_ensemble: OpenEnsemble) -> None:
    ensemble = open_ensemble(*names)
    reply = ensemble.generate(PROMPT, Overrides(max_tokens=0))
    assert (reply.text, reply.finish_reason, reply.steps) == ("", "length", ())
    assert [usage.prompt_evaluated for usage in reply.usage] == [0, 0]
    assert as_ever(ensemble, open_ensemble(*names))


def cut_characters(reply: Reply) -> Iterator[str]:
    """Characters of more than one byte that a piece does not end with, but cuts."""
    text, ends, offset = joined(reply.steps), set(np.cumsum([len(step.piece) for step in reply.steps]).tolist()), 0
    for character in text.decode("utf-8", "replace"):
        size = len(character.encode())
        if text[offset : offset + size] != character.encode():
            return  # bytes that are no character
        if any(offset < end < offset + size for end in ends):
            yield character
        offset += size


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("names", ENSEMBLES)
def test_a_stop_string_across_pieces_and_inside_a_character(
    names: tuple[str, str], strategy: str, open_ensemble: OpenEnsemble
) -> None:
    ensemble = open_ensemble(*names)
    found = {"pieces": 0, "characters": 0}
    for seed in range(60):
        settings = Overrides(seed=seed, max_tokens=40, strategy=strategy, top_k=0)  # type: ignore[arg-type]
        whole = ensemble.generate(PROMPT, settings)
        stops = {"characters": next(cut_characters(whole), "")}
        middle = joined(whole.steps[3:5]).decode("utf-8", "ignore")
        stops["pieces"] = middle if middle.encode() == joined(whole.steps[3:5]) else ""
        for kind, stop in stops.items():
            if stop and found[kind] < 3:
                found[kind] += 1
                reply = ensemble.generate(PROMPT, replace(settings, stop=(stop,)))
                text = joined(whole.steps)
                assert joined(reply.steps) == text[: text.index(stop.encode())]
                assert reply.finish_reason == "stop"
    assert min(found.values()) >= 2, found
    assert as_ever(ensemble, open_ensemble(*names))


def certain_end(member: Member, logits: LogitArray) -> None:
    logits[member.vocabulary.end_ids] = 1000.0


def impossible_end(member: Member, logits: LogitArray) -> None:
    logits[member.vocabulary.end_ids] = -np.inf


@pytest.mark.parametrize("names", ENSEMBLES)
def test_a_member_that_always_ends_at_once(names: tuple[str, str], open_ensemble: OpenEnsemble) -> None:
    """Under ME the reply ends where the member is drawn first; alone it gives an empty reply."""
    ensemble = open_ensemble(*names)
    settings, whole = long_reply(open_ensemble(*names), "me")
    drawn = [step.member for step in whole.steps].index(names[1])
    with pytest.MonkeyPatch.context() as patch:
        changed_logits(certain_end, 1)(ensemble, patch)
        reply = ensemble.generate(PROMPT, settings)
        assert reply.finish_reason == "stop"
        assert reply.steps == whole.steps[:drawn]
        for strategy in ("me", "ce"):
            alone = Overrides(seed=3, strategy=strategy, weights={names[0]: 0})  # type: ignore[arg-type]
            empty = ensemble.generate(PROMPT, alone)
            assert (empty.text, empty.finish_reason, empty.steps) == ("", "stop", ())
    assert as_ever(ensemble, open_ensemble(*names))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("names", ENSEMBLES)
def test_a_member_that_never_ends(names: tuple[str, str], strategy: str, open_ensemble: OpenEnsemble) -> None:
    """Alone, it goes on until `max_tokens`, or else until its context is full."""
    ensemble = open_ensemble(*names)
    with pytest.MonkeyPatch.context() as patch:
        changed_logits(impossible_end, 1)(ensemble, patch)
        for most, seed in [(60, 1), (60, 2), (10**6, 3)]:
            reply = ensemble.generate(
                PROMPT,
                Overrides(seed=seed, max_tokens=most, strategy=strategy, weights={names[0]: 0}),  # type: ignore[arg-type]
            )
            assert reply.finish_reason == "length"
            if most == 60:
                assert len(reply.steps) == 60
            else:
                text = ensemble.members[1].vocabulary.encode(joined(reply.steps))
                assert reply.usage[1].prompt_length + len(text) > 500
    assert as_ever(ensemble, open_ensemble(*names))
