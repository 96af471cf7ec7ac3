"""Bit for bit: what is asked for by itself is what a fresh memory gives, whatever was evaluated and kept before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from unittest.mock import patch

import numpy as np
import pytest
from conftest import OpenEnsemble, OpenMember, logits_of
from selection import slow_but

from me_local import Ensemble, Message, Overrides, Reply
from me_local.arrays import IntArray
from me_local.asking import Ask
from me_local.errors import RunError
from me_local.llama.batch import Part
from me_local.llama.cache import Cache
from me_local.llama.member import Member
from me_local.llama.origin import Origin, in_batches
from me_local.llama.states import States
from me_local.model import EvaluationInterruptedError
from me_local.server.making import Job, OneByOne

KINDS = {
    "full": ("bpe_a", True),
    "window": ("swa", True),
    "lossy window": ("swa", False),
    "recurrent": ("recurrent", True),
    "hybrid": ("hybrid", True),
}
SEVERAL = [("spm", "swa"), ("hybrid", "bpe_a"), ("recurrent", "swa")]


def test_batches_of_a_prompt() -> None:
    assert in_batches(0, (), 20, 8) == Origin((8, 16, 20))
    assert in_batches(0, (), 16, 8) == Origin((8, 16))
    assert in_batches(5, (), 20, 8) == Origin((13, 20))
    assert in_batches(0, (9, 20), 20, 8) == Origin((8, 9, 17, 20), (9, 20))
    assert in_batches(9, (9,), 20, 8) == Origin((9, 17, 20), (9,))
    assert in_batches(0, (), 0, 8) == Origin()


def test_how_much_came_the_same_way() -> None:
    origin = Origin((8, 16, 20, 30), (20,))
    assert origin.upto(20) == Origin((8, 16, 20), (20,))
    assert origin.upto(19) == Origin((8, 16))
    assert origin.after(16) == Origin((20, 30), (20,))
    assert origin.after(20) == Origin((30,))
    assert origin.shared(origin, 29) == 20
    assert origin.shared(Origin((8, 16, 21)), 30) == 16
    assert origin.shared(Origin((8, 16, 20)), 30) == 16  # where no state was kept
    assert origin.shared(Origin((9, 16)), 30) == 0


def reply(member: Member, prompt: IntArray, seed: int, *, alone: bool, final: int) -> Iterator[bytes]:
    """The logits along a text of random tokens, of which the last ones often change, into the prompt's."""
    random, ids = np.random.default_rng(seed), prompt
    member.prepare(prompt[:-1], final=final, alone=alone)
    for _ in range(8):
        member.sync(ids, final=len(ids) - 1)
        yield member.logits().tobytes()
        kept = ids[: len(ids) - random.choice([0, 0, 1, 3])]
        ids = np.concatenate([kept, random.integers(3, 340, random.integers(1, 9), dtype=np.int32)])


class History:
    """A member that is asked for many things, of which those by themselves are checked against a fresh memory."""

    def __init__(self, member: Member, reference: Member, seed: int) -> None:
        self.member, self.reference = member, reference
        self.random = np.random.default_rng(seed)
        bases = [self.random.integers(3, 340, 330, dtype=np.int32) for _ in range(2)]
        lengths = self.random.choice([2, 10, 17, 40, 75, 140, 290, 330], 8)
        self.prompts = [bases[i % 2][:length] for i, length in enumerate(lengths)]
        self.known: dict[tuple[int, int], list[bytes]] = {}

    def fresh(self, which: int, seed: int) -> list[bytes]:
        if (which, seed) not in self.known:
            self.reference.forget()
            prompt = self.prompts[which]
            self.known[which, seed] = list(reply(self.reference, prompt, seed, alone=True, final=len(prompt)))
        return self.known[which, seed]

    def step(self) -> None:
        which, seed = int(self.random.integers(len(self.prompts))), int(self.random.integers(2))
        prompt, final = self.prompts[which], int(self.random.integers(len(self.prompts[which])))
        match self.random.choice(["alone", "alone", "any", "broken off", "interrupted", "failed", "long"]):
            case "alone":
                assert list(reply(self.member, prompt, seed, alone=True, final=final)) == self.fresh(which, seed)
            case "any":
                list(reply(self.member, prompt, seed, alone=False, final=final))
            case "broken off":
                next(reply(self.member, prompt, seed, alone=bool(seed), final=final))
            case "interrupted":
                answers = iter([False] * seed + [True] * 100)
                with suppress(EvaluationInterruptedError):
                    self.member.prepare(prompt, lambda: next(answers), final=final, alone=bool(seed))
            case "failed":
                self.fail(prompt, alone=bool(seed))
            case "long":
                self.member.sync(self.random.integers(3, 340, 300, dtype=np.int32))

    def fail(self, prompt: IntArray, *, alone: bool) -> None:
        decode = self.member._decode

        def failing(parts: Sequence[Part]) -> int:
            return decode(parts) or 1

        with patch.object(self.member, "_decode", failing), suppress(RunError):
            self.member.prepare(prompt, alone=alone)


def check_history(open_member: OpenMember, kind: str, batch: int, budget: int, seed: int, steps: int) -> None:
    name, swa_full = KINDS[kind]
    member, reference = (open_member(name, n_batch=batch, swa_full=swa_full) for _ in range(2))
    member.states = States(budget) if budget else None
    history = History(member, reference, seed)
    for _ in range(steps):
        history.step()
    member.close()
    reference.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", slow_but([8, 100], 8))
@pytest.mark.parametrize("budget", slow_but([0, 10**9], 10**9))
def test_numbers_do_not_depend_on_what_was_before(open_member: OpenMember, kind: str, batch: int, budget: int) -> None:
    check_history(open_member, kind, batch, budget, seed=1, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10, 15))
def test_numbers_after_longer_histories(open_member: OpenMember, kind: str, seed: int) -> None:
    check_history(open_member, kind, [8, 32, 100, 512][seed % 4], [0, 60_000, 10**9][seed % 3], seed, steps=300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_by_itself_is_evaluated_once(open_member: OpenMember, kind: str) -> None:
    """Also with the text of a reply behind it, and batch by batch where another prompt begins like it."""
    name, swa_full = KINDS[kind]
    member = open_member(name, n_batch=64, swa_full=swa_full)
    prompt = np.random.default_rng(1).integers(3, 340, 150, dtype=np.int32)
    assert member.prepare(prompt, alone=True, final=150).tokens == 150
    member.sync(np.append(prompt, 7).astype(np.int32), final=151)
    assert member.prepare(prompt, alone=True, final=3).tokens == 0
    longer = np.append(prompt[:140], prompt)
    kept = 0 if kind in ("recurrent", "hybrid") else 128  # there is no checkpoint where the second batch ends
    assert member.prepare(longer, alone=True).tokens == len(longer) - kept


def test_what_was_cut_otherwise_is_evaluated_by_itself(open_member: OpenMember) -> None:
    """The same tokens, once by one batch and once by two, of which the first is a part of a larger one."""
    member = open_member("bpe_a")
    prompt = np.random.default_rng(2).integers(3, 340, 75, dtype=np.int32)
    assert member.prepare(prompt).tokens == 75
    assert member.prepare(prompt, alone=True).tokens == 0
    member.prepare(prompt[:40])
    assert member.prepare(prompt).tokens == 35
    assert member.prepare(prompt, alone=True).tokens == 75


def test_what_went_back_to_a_checkpoint_of_a_window_is_evaluated_by_itself(open_member: OpenMember) -> None:
    """The checkpoint has all cells of its 16 tokens, and may put them anywhere."""
    member, reference = (open_member("swa", n_batch=64, swa_full=False) for _ in range(2))
    random = np.random.default_rng(3)
    prompt, ids = random.integers(3, 340, 16, dtype=np.int32), random.integers(3, 340, 400, dtype=np.int32)
    member.prepare(prompt, alone=True)
    member.sync(np.concatenate([prompt, ids]), final=416)
    assert member.prepare(prompt).tokens == 0  # from the checkpoint
    assert member.caches[0].origin.ends == ()
    assert member.prepare(prompt, alone=True).tokens == 16
    reference.prepare(prompt, alone=True)
    for each in (member, reference):
        each.sync(np.append(prompt, ids[:1]))
    np.testing.assert_array_equal(member.logits(), reference.logits())


def test_what_the_cache_overrates_is_found_out(open_member: OpenMember) -> None:
    """How many tokens can be used is a forecast; how they came there is asked once they are all that is left."""
    member, reference = open_member("bpe_a"), open_member("bpe_a")
    prompt = np.random.default_rng(4).integers(3, 340, 100, dtype=np.int32)
    member.prepare(prompt)
    with patch.object(Cache, "usable", lambda cache, ids, _: cache.common(ids, len(ids))):
        assert member.prepare(prompt[:60], alone=True).tokens == 60
    assert member.caches[0].origin.ends == (60,)
    reference.prepare(prompt[:60], alone=True)
    np.testing.assert_array_equal(logits_of(member, prompt[:61]), logits_of(reference, prompt[:61]))


def ensemble_history(
    ensemble: Ensemble, reference: Callable[[], Ensemble], seed: int, steps: int, budget: int
) -> Iterator[tuple[Reply, Reply]]:
    """Replies of a server to requests with a seed, and those of an ensemble that has made no other."""
    random, making = np.random.default_rng(seed), OneByOne(ensemble, States(budget))
    words = ["the cat sat on the mat ", "word7 ", "and then: "]
    bases = [random.choice(words) * int(random.integers(1, 16)) for _ in range(3)]
    for _ in range(steps):
        prompt: str | list[Message] = str(random.choice(bases)) + str(random.choice(["", "and the dog"]))
        if random.random() < 0.6:
            prompt = [Message("user", prompt)]
            for _ in range(random.integers(3)):
                prompt += [Message("assistant", "ok then it is"), Message("user", "and now? " * 4)]
        seeded = bool(random.random() < 0.6)
        values = Overrides(
            seed=int(random.integers(2)) if seeded else None,
            max_tokens=int(random.choice([1, 5, 20])),
            strategy=random.choice(["me", "ce"]),
        )
        job = Job(Ask(prompt, values), hear=lambda _: None, admitted=False)
        making.begin(job)
        if random.random() < 0.2:
            making.step()
            making.cancel(job)
            assert not making.busy
            continue
        while making.busy:
            written = making.step()
        assert written[-1].reply is not None
        if seeded:
            other = reference()
            for member in other.members:
                member.forget()
            yield written[-1].reply, other.generate(prompt, values, raw=isinstance(prompt, str))


def check_replies(open_ensemble: OpenEnsemble, names: Sequence[str], settings: str, seed: int, steps: int) -> None:
    ensemble, reference = open_ensemble(*names, member=settings), open_ensemble(*names, member=settings)
    compared = 0
    for got, expected in ensemble_history(ensemble, lambda: reference, seed, steps, [60_000, 10**9][seed % 2]):
        assert got.steps == expected.steps
        compared += 1
    assert compared > steps / 4


@pytest.mark.slow
@pytest.mark.parametrize("names", SEVERAL)
def test_a_seed_gives_its_reply_whatever_the_server_made_before(
    open_ensemble: OpenEnsemble, names: Sequence[str]
) -> None:
    check_replies(open_ensemble, names, "n_batch = 32\nswa_full = false", seed=1, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("names", [*SEVERAL, ("bpe_a",), ("swa",), ("recurrent",), ("hybrid",)])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("swa_full", ["true", "false"])
def test_seeds_among_many_requests(open_ensemble: OpenEnsemble, names: Sequence[str], seed: int, swa_full: str) -> None:
    check_replies(open_ensemble, names, f"n_batch = {[8, 64][seed % 2]}\nswa_full = {swa_full}", seed, steps=100)
