"""Several replies at once: the same again, equal to lone replies, and no fault of one reaches another.

Logits differ in their low bits with what else is in an evaluation, so that a piece may differ where a random number
falls between: with 32-bit caches about once in 10^6 pieces. Seeds are fixed, and so are all evaluations, so that a test
that passes on a machine passes there again.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from me_local import Ensemble, InputError, Overrides, RunError, load
from me_local.asking import Ask, Prompts, make_request
from me_local.config import override
from me_local.decoding.batching import CHUNK, Running
from me_local.decoding.generation import Generation
from me_local.ensemble import Finished
from me_local.llama.member import Member
from me_local.mixture.routing import SharedRoute

WriteModels = Callable[..., Path]
OpenBatch = Callable[..., Ensemble]
EXACT = 'type_k = "f32"\ntype_v = "f32"'
SETS = [("bpe_a", "spm"), ("bpe_a", "bpe_b"), ("swa", "bpe_c"), ("hybrid", "recurrent")]
PROMPTS = [f"{'The cat sat. ' * (i % 5)}Number {i}" for i in range(14)]
SETTINGS = Overrides(seed=3, max_tokens=12)


@pytest.fixture
def open_batch(write_models: WriteModels) -> Iterator[OpenBatch]:
    """Loads an ensemble of tiny models for three replies at once, or for `batch`."""
    with ExitStack() as stack:

        def open_one(*names: str, batch: int = 3, n_ctx: int = 512, **given: Any) -> Ensemble:
            path = write_models(*names, member=EXACT, **given)
            path.write_text(path.read_text().replace("n_ctx = 512", f"n_ctx = {n_ctx}"))
            return stack.enter_context(load(path, batch=batch))

        yield open_one


def asks(*, lengths: bool = False) -> list[Ask]:
    """Prompts; with `lengths` replies of different lengths."""
    return [
        Ask(prompt, Overrides(max_tokens=1 + 7 * i % 11) if lengths else Overrides())
        for i, prompt in enumerate(PROMPTS)
    ]


def content(finished: Finished) -> tuple[object, ...]:
    """What of a reply must be the same again."""
    reply = finished.reply
    if reply is None:
        return finished.index, str(finished.error), finished.stretch
    return finished.index, [step.piece for step in reply.steps], reply.finish_reason, reply.seed, finished.stretch


@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize("route", ["shared", "own"])
def test_the_same_again(open_batch: OpenBatch, names: Sequence[str], route: Any) -> None:
    """Bit for bit, in the same order, also behind other replies, and with places that are taken again."""
    ensemble = open_batch(*names)
    settings = Overrides(seed=3, max_tokens=12, route=route)
    first = list(ensemble.generate_many(asks(lengths=True), settings))
    list(ensemble.generate_many(PROMPTS[::-1], Overrides(seed=9, max_tokens=3)))
    again = list(ensemble.generate_many(asks(lengths=True), settings))
    assert [content(finished) for finished in first] == [content(finished) for finished in again]
    assert [f.reply.steps for f in first if f.reply] == [f.reply.steps for f in again if f.reply]
    assert sorted(finished.index for finished in first) == list(range(len(PROMPTS)))
    assert [finished.index for finished in first] != list(range(len(PROMPTS)))
    starts = {finished.stretch.start for finished in first if finished.stretch}
    assert len(starts) > 3 if route == "shared" else not starts


@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_each_reply_is_what_it_is_alone(open_batch: OpenBatch, names: Sequence[str], strategy: Any) -> None:
    ensemble = open_batch(*names)
    settings = Overrides(seed=3, max_tokens=12, strategy=strategy)
    for finished in ensemble.generate_many(asks(lengths=True), settings):
        assert finished.reply is not None
        assert [step.piece for step in finished.reply.steps] == lone_pieces(ensemble, finished, settings)


def lone_pieces(ensemble: Ensemble, finished: Finished, settings: Overrides) -> list[bytes]:
    """The pieces of the reply, made by a generation of its own."""
    assert settings.seed is not None
    asked = asks(lengths=True)[finished.index]
    config = override(override(ensemble.config, settings), asked.overrides)
    config = override(config, Overrides(seed=settings.seed + finished.index))
    head, prompts, _ = ensemble.prompter.asked(asked.prompt, config, raw=False)
    request = make_request(config, Prompts(head, prompts))
    stretch = finished.stretch
    route = SharedRoute(stretch.seed).begin(stretch.start) if stretch else None
    draft = ensemble._draft(config, request, Generation(ensemble.engine, request, route=route))
    while draft.finish_reason is None:
        list(draft.take(draft.generation.step()))
    if stretch:
        assert stretch.end - stretch.start == sum(work.calls for work in draft.generation.work)
    return [step.piece for step in draft.steps]


@pytest.mark.parametrize("route", ["shared", "own"])
@pytest.mark.parametrize("names", [("bpe_a", "spm"), ("hybrid", "recurrent")])
def test_a_long_prompt_enters_in_chunks(open_batch: OpenBatch, route: Any, names: Sequence[str]) -> None:
    """Meanwhile the others go on, at each step: it takes part as many steps later as it has chunks."""
    ensemble = open_batch(*names, n_ctx=2048, batch=2)
    config = override(ensemble.config, Overrides(seed=1, max_tokens=60, ignore_eos=True, route=route))
    made = ensemble.batching(config, seed=1)
    long = "word " * 450
    first = ensemble.begin(made, config, Ask("Hello"))
    while len(first.draft.steps) < 3:
        made.step()
    second = ensemble.begin(made, config, Ask(long))
    longest = max(len(ids) for ids in second.request.prompts)
    assert longest > 2 * CHUNK
    written = []
    while not second.draft.steps:
        written.append([running for running, steps in made.step() if steps])
    meanwhile = [running for running in written if second not in running]
    assert len(meanwhile) >= longest // CHUNK
    assert all(first in running for running in meanwhile) or (route == "own" and any(meanwhile))
    alone = ensemble.start(config, Prompts(b"", second.request.prompts), alone=False)
    if route == "own":
        assert next(alone).piece == second.draft.steps[0].piece


def test_no_pieces_are_wanted(open_batch: OpenBatch) -> None:
    ensemble = open_batch("bpe_a", "spm", batch=2)
    wanted = [Ask("a", Overrides(max_tokens=count)) for count in (0, 3, 0, 0, 2)]
    replies = {f.index: f.reply for f in ensemble.generate_many(wanted, Overrides(seed=2))}
    assert [replies[i] and len(replies[i].steps) for i in range(5)] == [0, 3, 0, 0, 2]  # type: ignore[union-attr]
    assert {reply.finish_reason for reply in replies.values() if reply} == {"length"}


def test_a_reply_by_the_shared_route_does_not_wait_for_those_with_their_own(open_batch: OpenBatch) -> None:
    ensemble = open_batch("bpe_a", "spm", batch=2, n_ctx=1536)
    config = override(ensemble.config, Overrides(seed=1, max_tokens=400, route="shared"))
    made = ensemble.batching(config, seed=1)
    by_ce = ensemble.begin(made, config, Ask("Hello", Overrides(strategy="ce")))
    shared = ensemble.begin(made, config, Ask("word " * 200))
    assert shared.starts > made.clock
    for _ in range(20):
        made.step()
    assert by_ce.draft.finish_reason is None or by_ce.error is None
    assert shared.draft.steps


@pytest.mark.parametrize("batch", [2, 5])
def test_prompts_that_cannot_be_replied_to(open_batch: OpenBatch, batch: int) -> None:
    ensemble = open_batch("bpe_a", "spm", batch=batch)
    bad = {1: "word " * 600, 2: "", 5: "word " * 700}
    prompts = [bad.get(i, prompt) for i, prompt in enumerate(PROMPTS)]
    found = {finished.index: finished for finished in ensemble.generate_many(prompts, SETTINGS)}
    assert len(found) == len(PROMPTS)
    for index, finished in found.items():
        assert isinstance(finished.error, InputError if index in bad else type(None))
        assert (finished.reply is None) == (index in bad)
    assert "the prompt has" in str(found[1].error)


def failing(monkeypatch: pytest.MonkeyPatch, member: Member, fails: Callable[[list[int]], bool], code: int) -> None:
    """Evaluations of these sequences fail after having decoded."""
    decode = member._decode

    def planted(parts: Any) -> int:
        answer = decode(parts)
        return code if fails([cache.sequence for cache, *_ in parts]) else answer

    monkeypatch.setattr(member, "_decode", planted)


@pytest.mark.parametrize("names", SETS)
def test_evaluations_of_several_that_fail_are_tried_again_by_halves(
    open_batch: OpenBatch, monkeypatch: pytest.MonkeyPatch, names: Sequence[str]
) -> None:
    """Every third time, and whenever there are all three."""
    ensemble = open_batch(*names)
    undisturbed = [content(finished) for finished in ensemble.generate_many(asks(lengths=True), SETTINGS)]
    calls = iter(range(10**6))
    for member in ensemble.members:
        failing(monkeypatch, member, lambda places: len(places) > 2 or (len(places) == 2 and next(calls) % 3 == 0), 1)
    assert [content(f) for f in ensemble.generate_many(asks(lengths=True), SETTINGS)] == undisturbed
    assert next(calls) > 10


@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize("route", ["shared", "own"])
def test_a_sequence_that_fails_ends_its_reply_only(
    open_batch: OpenBatch, monkeypatch: pytest.MonkeyPatch, names: Sequence[str], route: Any
) -> None:
    ensemble = open_batch(*names)
    settings = Overrides(seed=3, max_tokens=12, route=route)
    prompts = PROMPTS[:3]
    undisturbed = {f.index: content(f) for f in ensemble.generate_many(prompts, settings)}
    failing(monkeypatch, ensemble.members[1], lambda places: 1 in places, -3)
    found = {f.index: f for f in ensemble.generate_many(prompts, settings)}
    assert [content(found[i]) for i in (0, 2)] == [undisturbed[i] for i in (0, 2)]
    assert isinstance(found[1].error, RunError)
    assert "llama.cpp failed with code -3" in str(found[1].error)


@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_not_a_number_ends_that_reply_only(
    open_batch: OpenBatch, monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    ensemble = open_batch("bpe_a", "spm")
    settings = Overrides(seed=3, max_tokens=12, strategy=strategy)
    undisturbed = {f.index: content(f) for f in ensemble.generate_many(PROMPTS[:3], settings)}
    member = ensemble.members[1]
    evaluate, row, current = member.evaluate, member.row, []

    def noted(parts: Any) -> None:
        evaluate(parts)
        current[:] = [cache.sequence for cache, ids, _ in parts for _ in ids]

    def spoiled(index: int) -> Any:
        logits = row(index)
        if current[index] == 2:
            logits[7] = np.nan
        return logits

    monkeypatch.setattr(member, "evaluate", noted)
    monkeypatch.setattr(member, "row", spoiled)
    found = {f.index: f for f in ensemble.generate_many(PROMPTS[:3], settings)}
    assert [content(found[i]) for i in (0, 1)] == [undisturbed[i] for i in (0, 1)]
    assert "NaN or infinite logits" in str(found[2].error)


@pytest.mark.parametrize("route", ["shared", "own"])
def test_cancelling_disturbs_no_other_reply(open_batch: OpenBatch, route: Any) -> None:
    """At random moments; those that are left equal what they are alone, with places that are taken again."""
    ensemble = open_batch("bpe_a", "spm", batch=4)
    settings = Overrides(seed=3, max_tokens=12, route=route)
    config = override(ensemble.config, settings)
    made, chance = ensemble.batching(config, seed=5), random.Random(1)
    todo = list(enumerate(asks(lengths=True) * 3))
    running: dict[Running, int] = {}
    cancelled = checked = 0
    while todo or running:
        while todo and made.free:
            index, ask = todo.pop(0)
            seeded = override(config, Overrides(seed=3 + index % len(PROMPTS)))
            running[ensemble.begin(made, seeded, ask)] = index % len(PROMPTS)
        if running and chance.random() < 0.3:
            one = chance.choice(list(running))
            del running[one]
            made.cancel(one)
            assert one.draft.finish_reason == "cancelled"
            cancelled += 1
        for one, _ in made.step():
            if one.draft.finish_reason:
                finished = Finished(running.pop(one), one.draft.reply, one.error, made.stretch(one))
                assert [step.piece for step in one.draft.steps] == lone_pieces(ensemble, finished, settings)
                checked += 1
    assert cancelled + checked == 3 * len(PROMPTS)
    assert min(cancelled, checked) > 8


@pytest.mark.parametrize("names", SETS[:2])
@pytest.mark.parametrize("finished", [(), (0, 1, 2), (1, 4, 5, 6), tuple(range(13))])
def test_going_on_with_an_earlier_run(open_batch: OpenBatch, names: Sequence[str], finished: Sequence[int]) -> None:
    """What is left gets the replies that it would have got, whichever are there."""
    ensemble = open_batch(*names)
    whole = {f.index: f for f in ensemble.generate_many(asks(lengths=True), SETTINGS)}
    earlier = {index: whole[index].stretch for index in finished}
    rest = {f.index: content(f) for f in ensemble.generate_many(asks(lengths=True), SETTINGS, earlier=earlier)}
    assert rest == {index: content(f) for index, f in whole.items() if index not in finished}


def test_all_cores_are_back_for_replies_of_another_kind(open_batch: OpenBatch) -> None:
    """CE with its members at the same time leaves each half of the cores, whoever runs next."""
    ensemble = open_batch("bpe_a", "spm", batch=2)
    ensemble.members[0].config = ensemble.members[1].config = replace(ensemble.members[0].config, n_threads=4)
    contexts = [member._context for member in ensemble.members]
    at_once = Overrides(strategy="ce", parallel=True, max_tokens=3)
    for reply in (ensemble.generate, lambda *asked: list(ensemble.generate_many(asked[:1] * 2, asked[1]))):
        reply("Hello", at_once)
        assert [llama_cpp.llama_n_threads(context) for context in contexts] == [2, 2]
        list(ensemble.generate_many(["Hello"] * 2, Overrides(max_tokens=3)))
        assert [llama_cpp.llama_n_threads(context) for context in contexts] == [4, 4]


@pytest.mark.parametrize("route", ["shared", "own"])
@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_calls_are_the_predictions_that_a_reply_asked_for(open_batch: OpenBatch, route: Any, strategy: Any) -> None:
    """One for each piece and for the end, of every member under CE; not those that only came along or waited."""
    ensemble = open_batch("bpe_a", "spm", "bpe_c", batch=6)
    for finished in ensemble.generate_many(PROMPTS, replace(SETTINGS, route=route, strategy=strategy)):
        reply = finished.reply
        assert reply is not None
        predictions = len(reply.steps) + (reply.finish_reason == "stop")
        calls = [usage.calls for usage in reply.usage]
        assert calls == [predictions] * 3 if strategy == "ce" else sum(calls) == predictions
