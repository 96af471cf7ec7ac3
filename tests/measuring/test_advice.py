"""What is advised of reports that are made up."""

from dataclasses import replace

from me_local.decoding.losses import Loss
from me_local.measuring.advice import advise
from me_local.measuring.inspection import MemberReport, PairReport

FINE = MemberReport(
    name="a",
    path="a.gguf",
    architecture="llama",
    engine="llama.cpp",
    address=None,
    parameters=10**9,
    quantisation="Q4_K",
    context=4096,
    trained_context=8192,
    memory="full",
    vocabulary="BPE",
    vocabulary_size=3,
    template="GGUF",
    end_tokens=(),
    weights_bytes=10**9,
    kv_cache_bytes=10**8,
    working_bytes=10**8,
    total_bytes=12 * 10**8,
    lost=Loss(),
    thinks=(),
    writes=(),
    base=False,
    pre_tokenizer="llama-bpe",
    bytes_per_token=4.0,
    step_seconds=0.01,
    several_seconds=0.06,
)
PAIR = PairReport("a", "b", same_vocabulary=False, shared_pieces=0.5, first_in_second=1, second_in_first=1,
                  agreement=0.9, risky=False)  # fmt: skip


def one(member: MemberReport) -> str:
    (sentence,) = advise([member], [], None)
    return sentence


def test_nothing_where_nothing_is_known_to_be_wrong() -> None:
    assert advise([FINE, replace(FINE, name="b")], [PAIR], 10**9) == []
    assert advise([replace(FINE, vocabulary="SPM", pre_tokenizer=None)], [], None) == []
    assert advise([replace(FINE, base=True, template="chatml")], [], None) == []


def test_members() -> None:
    assert "a: it seems to be a base model" in one(replace(FINE, base=True, template="plain"))
    assert "names no pre-tokenizer" in one(replace(FINE, pre_tokenizer=None))
    assert "40% of what it would begin" in one(replace(FINE, lost=Loss(0.4, "<|call|>")))
    assert "8 tokens at once take 7.5 times as long as one" in one(replace(FINE, several_seconds=0.075))
    assert one(replace(FINE, context=512)).endswith("512 tokens of context are soon full: n_ctx = 4096, gives it more")
    trained = one(replace(FINE, context=512, trained_context=512))
    assert trained.endswith("it was trained with 512, no setting changes that")


def test_pairs_and_all_together() -> None:
    other = replace(FINE, name="b", path="b.gguf")
    (risky,) = advise([FINE, other], [replace(PAIR, risky=True)], None)
    assert risky.startswith("a and b: a model of the other's family")
    (thinks,) = advise([replace(FINE, thinks=(("<think>", "</think>"),)), other], [], None)
    assert thinks.startswith("a may think before an answer, which b never learnt")
    (memory,) = advise([FINE, other], [], 15 * 10**8)
    assert memory.startswith("all weights take 2.0 GB, and 1.5 GB are free beside 400.0 MB of contexts")
    assert advise([FINE, replace(other, path=FINE.path)], [], 15 * 10**8) == []
