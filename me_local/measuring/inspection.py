"""Reports on a loaded ensemble: what each member is and takes up, and how well two vocabularies go together.

Reads what members know about themselves and tokenises a sample text. Sizes are in bytes, contexts
in tokens, shares between 0 and 1.
"""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate

from me_local.decoding.losses import Loss
from me_local.engines.remote import RemoteModel
from me_local.llama.member import Member
from me_local.llama.memory import allocated_context, kv_cache_bytes
from me_local.llama.options import longest_context
from me_local.llama.weights import VocabularyFile
from me_local.model import LoadedModel
from me_local.text.thoughts import Kind
from me_local.text.vocabulary import Vocabulary

RISKY_AGREEMENT = 0.6
"""A pair whose agreement on the sample text is lower is risky.

Vocabularies of language models have 0.65 (GPT-2 and Qwen2) to 1 with each other.
"""

_PRE_TOKENIZER = "tokenizer.ggml.pre"

SAMPLE = '''\
When the ferry finally left the harbour, most of the passengers had already fallen asleep on the wooden benches. \
Nobody noticed that the old lighthouse, which hadn't worked since the autumn of 1987, was flashing again: twice, then \
a long pause, then three times. "That's impossible," said the engineer, wiping her glasses. "We removed the lamp \
ourselves!" She was right, of course. Photosynthesis, thermodynamics and the misunderstood second law weren't her \
speciality, but she knew electricity; and there was no cable, no battery, no generator left on that island.

Questions to answer before you start:
  1. How quickly does the temperature change, and what is it measured with?
  2. Who is responsible if something goes wrong - the owner, the manufacturer or the user?
  3. Why shouldn't we simply re-use last year's numbers?

Im Frühling öffnete die Bürgermeisterin das kleine Museum am Flussufer wieder. Die Ausstellung erzählt von \
Handwerkern, Fischern und Straßenmusikanten, die im neunzehnten Jahrhundert hier lebten; besonders schön ist die \
vollständig erhaltene Werkstatt eines Geigenbauers. Natürlich gab es Schwierigkeiten: Die Feuchtigkeit hatte viele \
Gemälde beschädigt, und für eine sorgfältige Wiederherstellung fehlte zunächst das Geld.

def moving_average(values: list[float], window: int = 3) -> list[float]:
    """The mean of each run of `window` values."""
    if window < 1 or len(values) < window:
        raise ValueError(f"window must be between 1 and {len(values)}, got {window}")
    total = sum(values[:window])
    averages = [total / window]
    for old, new in zip(values, values[window:]):
        total += new - old
        averages.append(total / window)
    return averages

#include <stdio.h>
int main(void) {
	for (size_t i = 0; i != 10; ++i) {
		printf("%zu squared is %zu\\n", i, i * i);
	}
	return 0;
}

SELECT name, COUNT(*) AS orders FROM customers WHERE city = 'Oslo' GROUP BY name HAVING COUNT(*) >= 5;
{"id": 40721, "active": true, "tags": ["new", "blue-green"], "price": 1299.95, "url": "https://example.org/a?b=c"}

The budget rose from 1,204,500 to 3,250,075 euros (+169.8 %) between 2009-03-31 and 2024-12-05; pi is about \
3.14159265358979, the speed of light 299792458 m/s, and 7 * 8 = 56.

春天来了，河边的小博物馆重新开放。展览介绍了当地的渔民和工匠，门票每人三十元。
彼女は電車の窓から海を見ていた。明日は雨が降るかもしれません。
'''  # noqa: RUF001
"""English, German, code, numbers, a little Chinese and Japanese."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """What a member is and takes up: sizes in bytes, contexts in tokens; None for what cannot be computed.

    `step_seconds` is what an evaluation of one token takes, `several_seconds` that of `cost.SEVERAL` at once;
    `bytes_per_token` how much of a text a token is. Of one that runs elsewhere, at `address`, only what the file of its
    vocabulary and its engine say; a step is there and back again, the median of 20, `slots` how many contexts the
    engine has, `prefix_cache` whether it finds earlier ones again.
    """

    name: str
    path: str
    architecture: str
    engine: str
    address: str | None = None
    parameters: int | None = None
    quantisation: str | None = None  # in llama.cpp's words
    context: int
    trained_context: int
    memory: str | None = None  # "full", "sliding window N", "recurrent" or "hybrid"
    vocabulary: str  # "BPE", "SPM", ...
    vocabulary_size: int
    template: str  # "GGUF", "plain", the name of a built-in or a path
    end_tokens: tuple[str, ...]
    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    working_bytes: int | None = None  # llama.cpp's buffers for a batch
    total_bytes: int | None = None
    lost: Loss | None = None  # of its first prediction
    thinks: tuple[tuple[str, str], ...]  # the marks around thoughts that it may write
    writes: tuple[str, ...]  # control tokens that are part of its text
    base: bool  # there is no chat template in its file
    pre_tokenizer: str | None  # which rules part a text before its tokens are looked for, as its file names them
    bytes_per_token: float  # in the sample text
    slots: int | None = None
    step_seconds: float | None = None
    several_seconds: float | None = None
    prefix_cache: bool | None = None


@dataclass(frozen=True, slots=True)
class PairReport:
    """How two members' vocabularies go together; all shares are between 0 and 1."""

    first: str
    second: str
    same_vocabulary: bool
    shared_pieces: float  # of the pieces that either has
    first_in_second: float  # of the first one's pieces, those that the second has
    second_in_first: float
    agreement: float  # of the places where either cuts the sample text, those where both do
    risky: bool


def inspect_member(
    member: LoadedModel,
    lost: Loss | None = None,
    kinds: Sequence[Kind] = (),
    steps: tuple[float, float] | None = None,
) -> MemberReport:
    """Report on a loaded member; `lost` is what `first_loss` gives of it, `steps` what `cost.steps` does.

    `kinds` are those of its thoughts.

    Raises RunError.
    """
    if isinstance(member, RemoteModel):
        report = _described(member, member.file, kinds)
        seconds, cached = member.measure()
        return replace(
            report,
            address=member.config.url,
            slots=member.description.places,
            step_seconds=seconds,
            prefix_cache=cached,
        )
    assert isinstance(member, Member)
    weights = member.weights
    cells = allocated_context(member.config.n_ctx, longest_context(member.config, weights.trained_context))
    kv_cache = kv_cache_bytes(weights.metadata, weights.memory, member.config, cells)
    sizes = (weights.size, kv_cache, member.working_bytes)
    return replace(
        _described(member, weights, kinds),
        parameters=weights.parameters,
        quantisation=quantisation(weights.description),
        memory=weights.memory,
        weights_bytes=weights.size,
        kv_cache_bytes=kv_cache,
        working_bytes=member.working_bytes,
        total_bytes=None if None in sizes else sum(size or 0 for size in sizes),
        lost=lost,
        step_seconds=steps and steps[0],
        several_seconds=steps and steps[1],
    )


def _described(member: Member | RemoteModel, file: VocabularyFile, kinds: Sequence[Kind]) -> MemberReport:
    """What the file and the vocabulary of a member say, wherever it runs."""
    vocabulary = member.vocabulary
    return MemberReport(
        name=member.name,
        path=str(file.path),
        architecture=file.metadata.get("general.architecture", "unknown"),
        engine=member.abilities.engine,
        context=member.n_ctx,
        trained_context=file.trained_context,
        vocabulary=vocabulary.kind,
        vocabulary_size=vocabulary.size,
        template=member.config.chat_template or ("GGUF" if file.chat_template else "plain"),
        end_tokens=tuple(vocabulary.text_of(token) for token in vocabulary.end_ids),
        thinks=tuple((kind.openings[0], kind.closing) for kind in kinds),
        writes=tuple(name.decode() for name in vocabulary.written),
        base=file.chat_template is None,
        pre_tokenizer=file.metadata.get(_PRE_TOKENIZER),
        bytes_per_token=len(SAMPLE.encode()) / len(vocabulary.encode(SAMPLE.encode(), at_start=True)),
    )


def longest_that_fits(member: MemberReport, free: int) -> int | None:
    """How many tokens of context it could have with so many bytes more, alone; None where that cannot be reckoned."""
    if not member.kv_cache_bytes or not member.trained_context:
        return None
    cells = allocated_context(member.context, member.trained_context)
    most = int(cells * (member.kv_cache_bytes + free) / member.kv_cache_bytes)
    return min(most, member.trained_context)


def compare(a: LoadedModel, b: LoadedModel) -> PairReport:
    """Report on how the vocabularies of two loaded members go together."""
    same = a.vocabulary.identity == b.vocabulary.identity
    pieces, others = sampleable(a.vocabulary), sampleable(b.vocabulary)
    shared = len(pieces & others)
    cuts = 1.0 if same else overlap(boundaries(a.vocabulary, SAMPLE), boundaries(b.vocabulary, SAMPLE))
    return PairReport(
        first=a.name,
        second=b.name,
        same_vocabulary=same,
        shared_pieces=overlap(pieces, others),
        first_in_second=shared / len(pieces),
        second_in_first=shared / len(others),
        agreement=cuts,
        risky=cuts < RISKY_AGREEMENT,
    )


def sampleable(vocabulary: Vocabulary) -> set[bytes]:
    """The pieces that a member can add to a text."""
    never = {*vocabulary.end_ids, *vocabulary.removed}
    return {piece for token, piece in enumerate(vocabulary.pieces) if piece and token not in never}


def boundaries(vocabulary: Vocabulary, text: str) -> set[int]:
    """Where the tokens of a text meet, as byte offsets inside it: its start and its end are left out."""
    encoded = text.encode()
    ends = accumulate(len(vocabulary.pieces[token]) for token in vocabulary.encode(encoded))
    return set(ends) - {0, len(encoded)}


def overlap(a: Set[object], b: Set[object]) -> float:
    """The share of what either has that both have; 1 where neither has any."""
    return len(a & b) / len(a | b) if a or b else 1.0


def quantisation(description: str) -> str:
    """The file type in llama.cpp's description of a model: "Q4_K - Medium" of "llama 8B Q4_K - Medium"."""
    match = re.fullmatch(r"\S+ \S+(?: \((?:Scout|Maverick)\))? (.+)", description)
    return match[1] if match else description
