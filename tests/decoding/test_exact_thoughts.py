"""Replies of members that think have exactly the probabilities that the definition gives them.

As in test_exact_replies.py. In the definition, control tokens of thoughts are pieces, their names; T_i makes them of
these names in a reply and in the head of one, but not in what a user typed. Worked out here by hand.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import make_tiny_models
import numpy as np
import pytest
from conftest import logits_of
from selection import slow_but
from test_exact_replies import EXACT, SETTINGS, Case, OpenAll, Tree, case, g_test, remembering, reply_of, request, start
from test_exact_replies import Reply as Pieces
from tiny_architectures import CONSTANT, llama_model
from tiny_vocabularies import chatml_vocab, control, spm_vocab

from me_local.decoding.generation import Generation
from me_local.llama.member import Member
from me_local.text.vocabulary import Vocabulary

COUNT = 6_000  # replies of a case
NAMES = ("[THINK]", "[/THINK]")

CASES = {
    "one that thinks": (case("thinks", "bpe_c", head=b"[THINK]the cat", weights=(0.6, 0.4)), True),
    "a head that ends in the middle of a name": (case("thinks", "spm", head=b"[THINK]a[/THIN", top_k=5), True),
    "one vocabulary": (case("thinks", "thinks_too", head=b"the[/THINK]"), True),
    "BPE and SPM": (case("thinks", "spm_thinks", head=b"[THINK] the", temperature=0.7), True),
    "a name that was typed": (case("thinks", "bpe_c", head=b"the [THINK]cat"), False),
    "typed, one vocabulary": (case("thinks", "thinks_too", head=b"the [THINK]cat"), False),
}


@pytest.fixture(scope="module")
def tiny(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models, and some that often write control tokens of thoughts."""
    folder = tmp_path_factory.mktemp("thinking")
    made = {}
    for name, make, seed in (
        ("thinks", chatml_vocab, 1),
        ("thinks_too", chatml_vocab, 2),
        ("spm_thinks", spm_vocab, 3),
    ):
        vocab = make()
        vocab.tokens.extend(control(*NAMES))
        model = llama_model(vocab, seed)
        output = model.tensors["output.weight"]
        output[-len(NAMES) :, CONSTANT] = output[:, CONSTANT].max()
        made[name] = folder / f"{name}.gguf"
        make_tiny_models.write_model(made[name], vocab=vocab, model=model)
    return tiny | made


def ids_by_hand(vocabulary: Vocabulary, text: bytes, typed: int) -> list[int]:
    """The ids of a text in which names are tokens, but for those that begin in what was typed."""
    names = [name.encode() for name in NAMES if name in vocabulary.control]
    pattern = b"(" + b"|".join(map(re.escape, names)) + b")" if names else b"(?!)"
    first, *others = re.split(pattern, text[typed:])
    ids = vocabulary.encode(text[:typed] + first, at_start=typed > 0)
    for name, behind in zip(others[::2], others[1::2], strict=True):
        ids += [vocabulary.control[name.decode()], *vocabulary.encode(behind)]
    return ids


class ThoughtTree(Tree):
    """The same for replies of which some control tokens are pieces."""

    def __init__(self, members: list[Member], this: Case, *, prefill: bool) -> None:
        super().__init__(members, this)
        self._typed = 0 if prefill else len(this.head)

    def _logits(self, member: Member, reply: Pieces) -> list[float]:
        before = [*start(member), 300] if self._typed == 0 else start(member)
        if self._same:
            head = ids_by_hand(member.vocabulary, self._case.head, self._typed)
            ids = [*before, *head, *reply]
        else:
            ids = [*before, *ids_by_hand(member.vocabulary, self.text(reply), self._typed)]
        member.forget()
        return logits_of(member, np.array(ids, dtype=np.int32)).tolist()


@pytest.fixture
def open_all(open_member: Callable[..., Member]) -> OpenAll:
    """The members of a case."""
    return lambda this: [open_member(name, **SETTINGS) for name in this.names]


def draw(members: list[Member], this: Case, strategy: str, *, prefill: bool) -> Counter[Pieces]:
    engine = remembering(members, this)
    drawn: Counter[Pieces] = Counter()
    for seed in range(COUNT):
        made = request(engine.models, this, strategy, seed)
        if prefill:
            prompts = tuple(np.array([*prompt, 300], np.int32) for prompt in made.prompts)
            made = replace(made, prompts=prompts, prefill=True)
        drawn[reply_of(Generation(engine, made), engine.unified.same, this.length)] += 1
    return drawn


@pytest.mark.parametrize(
    "which", slow_but([(name, s) for name in CASES for s in ("me", "ce")], ("one that thinks", "me")), ids=" by ".join
)
def test_replies_have_the_probabilities_of_the_definition(open_all: OpenAll, which: tuple[str, str]) -> None:
    name, strategy = which
    this, prefill = CASES[name]
    drawn = draw(open_all(this), this, strategy, prefill=prefill)
    tree = ThoughtTree(open_all(this), this, prefill=prefill)
    cells = tree.cells(COUNT)
    assert sum(cells.values()) == pytest.approx(1, abs=1e-9)
    assert [reply for reply in drawn if not tree.possible(reply)] == []
    assert any("THINK]" in repr(tree.text(reply)[len(this.head) :]) for reply in drawn)
    assert g_test(drawn, cells) > EXACT
