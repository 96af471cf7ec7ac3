"""The loop on tiny models: canonical contexts, ME against CE, routes, and the ends of contexts."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from conftest import logits_of
from scipy import stats
from selection import slow_but

from me_local.arrays import FloatArray, IntArray, LogitArray
from me_local.decoding.engine import Draw, Engine, Request
from me_local.decoding.generation import Generation
from me_local.errors import RunError
from me_local.llama.member import Member
from me_local.measuring.bench import endless
from me_local.mixture.alignment import top_k
from me_local.mixture.routing import constant
from me_local.sampling import Sampling
from me_local.text.unified import END

OpenMember = Callable[..., Member]
PAIRS = [("bpe_a", "bpe_b"), ("bpe_a", "bpe_c"), ("bpe_c", "spm"), ("bpe_b", "bpe_c", "spm")]
EXACT = 1e-6  # the odds of a false alarm of one G-test


def request(members: Sequence[Member], **settings: object) -> Request:
    """A raw completion of "the cat" with equal weights, unless told otherwise."""
    count = len(members)
    values: dict[str, object] = {
        "prompts": tuple(np.array(start(m), dtype=np.int32) for m in members),
        "weights": np.full(count, 1 / count),
        "sampling": (Sampling(),) * count,
        "strategy": "me",
        "argmax": False,
        "seed": 0,
        "head": b"the cat",
    }
    return Request(**(values | settings))  # type: ignore[arg-type]


def start(member: Member) -> list[int]:
    """The ids in front of every context of a member."""
    return [] if member.vocabulary.bos is None else [member.vocabulary.bos]


def generation(members: Sequence[Member], engine: Engine | None = None, **settings: object) -> Generation:
    return Generation(engine or Engine(members, constant, top_k), request(members, **settings), lambda: False)


def steps(running: Generation, count: int) -> list[Draw]:
    """Steps until `count` or the end of generation."""
    draws: list[Draw] = []
    while len(draws) < count:
        draw = running.step()
        if draw is None or draw.number == END:
            break
        draws.append(draw)
    return draws


def fresh_logits(member: Member, text: bytes) -> FloatArray:
    """The logits after a whole text in an empty cache, in one pass."""
    member.forget()
    ids = np.array(start(member) + member.vocabulary.encode(text, at_start=True), dtype=np.int32)
    return logits_of(member, ids).astype(np.float64)


def reference(member: Member, text: bytes, sampling: Sampling) -> dict[bytes | None, float]:
    """The alignment once more, slowly: probabilities of pieces, with None for the end of generation."""
    vocabulary, logits = member.vocabulary, fresh_logits(member, text)
    ends = set(vocabulary.end_ids)
    usable = [i for i in range(vocabulary.size) if vocabulary.pieces[i] or i in ends]
    best = sorted(usable, key=lambda i: -logits[i])[: sampling.top_k or None]
    odds = [math.exp((logits[i] - logits[best[0]]) / sampling.temperature) for i in best]
    total: Counter[bytes | None] = Counter()
    for i, value in zip(best, odds, strict=True):
        total[None if i in ends else vocabulary.pieces[i]] += value / sum(odds)
    return dict(total)


@pytest.mark.parametrize("names", PAIRS[1:])
def test_each_step_sees_the_canonical_context_and_its_logits(open_member: OpenMember, names: tuple[str, ...]) -> None:
    members = [open_member(name) for name in names]
    references = {name: open_member(name) for name in names}
    seen: list[LogitArray] = []

    def spy(logits: LogitArray, numbers: IntArray, sampling: Sampling) -> object:
        seen.append(logits.copy())
        return top_k(logits, numbers, sampling)

    engine = Engine(members, constant, spy)  # type: ignore[arg-type]
    cut = 0
    for seed in range(12):
        running = generation(members, engine, seed=seed, sampling=(Sampling(top_k=0),) * len(members))
        for _ in range(25):
            text = running.text
            draw = running.step()
            if draw is None or draw.number == END:
                break
            member = members[draw.member]
            ids = start(member) + member.vocabulary.encode(text, at_start=True)
            assert member.caches[0].ids.tolist() == ids
            np.testing.assert_allclose(seen[-1], fresh_logits(references[member.name], text), atol=2e-3)
            cut += text.decode("utf-8", "ignore").encode() != text
    assert cut >= 10, "too few steps in the middle of a character to mean anything"


def test_with_one_vocabulary_the_context_is_what_was_sampled(open_member: OpenMember) -> None:
    members = [open_member("bpe_a"), open_member("bpe_b")]
    running = generation(members, seed=3)
    head = members[0].vocabulary.encode(b"the cat")
    sampled = [draw.number - 1 for draw in steps(running, 30)]
    assert len(sampled) >= 5
    running.step()
    synced = max(members, key=lambda member: member.caches[0].length)
    assert synced.caches[0].ids.tolist() == (head + sampled)[: synced.caches[0].length]


@pytest.mark.parametrize("names", slow_but(PAIRS, PAIRS[2]))
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5, temperature=0.5), Sampling(top_k=0)])
def test_one_step_of_me_has_the_distribution_of_the_mixture(
    open_member: OpenMember, names: tuple[str, ...], sampling: Sampling
) -> None:
    members = [open_member(name) for name in names]
    weights = np.array([0.7, 0.2, 0.1][: len(names)]) / sum([0.7, 0.2, 0.1][: len(names)])
    exact: Counter[bytes | None] = Counter()
    for member, weight in zip(members, weights, strict=True):
        for piece, probability in reference(member, b"the cat", sampling).items():
            exact[piece] += weight * probability
    engine = Engine(members, constant, top_k)
    drawn: Counter[bytes | None] = Counter()
    for seed in range(2000):
        running = generation(members, engine, seed=seed, weights=weights, sampling=(sampling,) * len(names))
        draw = running.step()
        assert draw is not None
        drawn[None if draw.number == END else draw.piece] += 1
    assert set(drawn) <= set(exact)
    assert g_test(drawn, exact) > EXACT


def g_test(drawn: Counter[bytes | None], exact: Counter[bytes | None]) -> float:
    """The p-value of the counts under exact probabilities; cells that expect fewer than 5 are pooled."""
    count = sum(drawn.values())
    large = [piece for piece in exact if exact[piece] * count >= 5]
    observed = [drawn[piece] for piece in large]
    expected = [exact[piece] * count for piece in large]
    if count - sum(expected) > 1e-6:
        observed.append(count - sum(observed))
        expected.append(count - sum(expected))
    return float(stats.power_divergence(observed, expected, lambda_="log-likelihood").pvalue)


@pytest.mark.parametrize("names", PAIRS)
def test_ce_gives_the_mixture_and_its_shares(open_member: OpenMember, names: tuple[str, ...]) -> None:
    members = [open_member(name) for name in names]
    parts = [reference(member, b"the cat", Sampling()) for member in members]
    for seed in range(20):
        draw = generation(members, strategy="ce", seed=seed).step()
        assert draw is not None
        piece = None if draw.number == END else draw.piece
        each = [part.get(piece, 0.0) / len(names) for part in parts]
        assert draw.probability == pytest.approx(sum(each), abs=1e-4)
        assert draw.shares == pytest.approx([value / sum(each) for value in each], abs=1e-3)
        assert draw.member == int(np.argmax(draw.shares))


def test_argmax_takes_the_best_piece_of_the_mixture(open_member: OpenMember) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    mixture: Counter[bytes | None] = Counter()
    for member in members:
        for piece, probability in reference(member, b"the cat", Sampling()).items():
            mixture[piece] += probability / 2
    draws = {generation(members, strategy="ce", argmax=True, seed=seed).step() for seed in range(5)}
    assert len(draws) == 1
    draw = draws.pop()
    assert draw is not None
    best, probability = mixture.most_common(1)[0]
    assert (draw.piece or None, draw.probability) == (best, pytest.approx(probability, abs=1e-4))


def test_temperature_zero_is_each_members_own_argmax(open_member: OpenMember) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    best = [max(reference(m, b"the cat", Sampling(top_k=1)).items(), key=lambda kv: kv[1])[0] for m in members]
    for seed in range(10):
        draw = generation(members, seed=seed, sampling=(Sampling(temperature=0),) * 2).step()
        assert draw is not None
        assert draw.probability == 1.0
        assert (draw.piece or None) == best[draw.member]


@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_seed_repeats_its_reply_whatever_the_caches_hold(open_member: OpenMember, strategy: str) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    engine = Engine(members, constant, top_k)
    first = steps(generation(members, engine, strategy=strategy, seed=5), 40)
    steps(generation(members, engine, strategy=strategy, seed=6, head=b"another text"), 10)
    assert steps(generation(members, engine, strategy=strategy, seed=5), 40) == first
    assert len(first) > 3


def test_the_route_does_not_depend_on_the_text(open_member: OpenMember) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    routes = []
    for head in (b"the cat", b"12 dogs", b"\n"):
        running = generation(members, endless(Engine(members, constant, top_k)), seed=11, head=head)
        routes.append([draw.member for draw in steps(running, 40)])
    length = min(map(len, routes))
    assert length > 5
    assert routes[0][:length] == routes[1][:length] == routes[2][:length]
    assert set(routes[0][:length]) == {0, 1}


def lacking(member: Member, byte: int) -> None:
    del member.vocabulary._byte_ids[byte]


@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_member_that_lacks_a_byte_of_a_cut_character_sits_out(open_member: OpenMember, strategy: str) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    lacking(members[1], 0x9F)
    written = set()
    for seed in range(20):
        running = generation(members, strategy=strategy, seed=seed)
        running._text.append("👋".encode()[:2])
        draw = running.step()
        assert draw is not None
        assert draw.shares == (1.0, 0.0)
        # Once the character is whole, the member takes part again.
        running = generation(members, strategy=strategy, seed=seed)
        running._text.append("👋".encode()[:2])
        running._text.append("👋".encode()[2:])
        draw = running.step()
        assert draw is not None
        written |= {i for i, share in enumerate(draw.shares) if share > 0}
    assert written == {0, 1}


def test_a_text_that_no_member_can_write_is_an_error(open_member: OpenMember) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    for member in members:
        lacking(member, 0x9F)
    running = generation(members)
    running._text.append("👋".encode()[:2])
    with pytest.raises(RunError, match=r"no member .* after 9 bytes of text: none has tokens"):
        running.step()


def test_weights_may_depend_on_the_text(open_member: OpenMember) -> None:
    members = [open_member("bpe_c"), open_member("spm")]

    def even_first(text: bytes, weights: FloatArray) -> FloatArray:
        return np.array([1.0, 0.0] if len(text) % 2 == 0 else [0.0, 2.0])

    engine = Engine(members, even_first, top_k)
    for seed in range(5):
        running = generation(members, engine, seed=seed)
        for _ in range(10):
            parity = len(running.text) % 2
            draw = running.step()
            assert draw is not None
            assert draw.member == parity
            if draw.number == END:
                break


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0], "not one weight"), ([1.0, -1.0], "0 or more"), ([np.nan, 1.0], "0 or more"), ([0.0, 0.0], "above 0")],
)
def test_weights_that_no_router_may_give(open_member: OpenMember, weights: list[float], message: str) -> None:
    members = [open_member("bpe_c"), open_member("spm")]
    engine = Engine(members, lambda text, configured: np.array(weights), top_k)
    with pytest.raises(RunError, match=message):
        generation(members, engine).step()


@pytest.mark.parametrize("strategy", ["me", "ce"])
def test_a_reply_ends_where_any_members_context_does(open_member: OpenMember, strategy: str) -> None:
    large, small = open_member("bpe_c"), open_member("spm")
    small.n_ctx = 20
    for seed in range(10):
        running = generation([large, small], strategy=strategy, seed=seed, weights=np.array([0.99, 0.01]))
        count = len(steps(running, 60))
        # BOS and the canonical ids, whether or not the small member was ever drawn.
        length = 1 + len(small.vocabulary.encode(running.text, at_start=True))
        ended = running.step() is None
        assert ended == (length > 20)
        assert count < 60


def test_whether_a_long_text_fits_is_seldom_asked(open_member: OpenMember) -> None:
    """A member that is not drawn tokenises a text of many more bytes than its context has tokens a few times only."""
    drawn, other = open_member("bpe_c", n_ctx=2048), open_member("spm")
    encode, calls = other.vocabulary.encode, []

    def counting(text: bytes, *, at_start: bool = False) -> list[int]:
        calls.append(text)
        return encode(text, at_start=at_start)

    other.vocabulary.encode = counting  # type: ignore[method-assign]
    head, weights = b"the cat sat on the mat " * 40, np.array([1 - 1e-12, 1e-12])
    lengths = [len(encode(head, at_start=True))]
    room = lengths[0] + 100
    other.n_ctx = 1 + room
    running = generation([drawn, other], endless(Engine([drawn, other], constant, top_k)), weights=weights, head=head)
    before = len(calls)
    while running.step():
        lengths.append(len(encode(running.text, at_start=True)))
    assert max(lengths[:-1]) <= room < lengths[-1]
    assert len(calls) - before < len(lengths) / 2


def test_what_ends_repetitions_is_not_kept_for_ever(open_member: OpenMember) -> None:
    """Requests bring texts of their own, and each would take a byte for each token."""
    engine = Engine([open_member("spm")], constant, top_k)
    for i in range(100):
        engine.shaper(0, Sampling(dry_multiplier=1.0, dry_sequence_breakers=(f"a{i}",)), 0)
    assert engine._breaking.cache_info().currsize < 50
