"""Token ids and bytes: one GGUF vocabulary, its canonical tokenising, and the vocabulary that members share.

The contract: the shared state of an ensemble is bytes. A `Vocabulary` turns token ids into bytes (pieces) and any
bytes into the ids that its tokenizer gives them; `TokenizedText` does the second for a text that grows, at the cost
of its tail only; `UnifiedVocabulary` numbers the pieces of all members, so that mixing is arithmetic on arrays.
Knows nothing of weights, contexts or sampling.
"""

import functools
import hashlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from me_local.errors import InputError, LoadError, RunError
from me_local.system.inflight import InFlight
from me_local.text.parts import LONG, Fewest, Parts
from me_local.text.pieces import find_end_ids, header_value, read_pieces, suppressed
from me_local.text.seams import Seams

IntArray = npt.NDArray[np.int32]
Encoder = Callable[[bytes], list[int]]
Watch = Callable[[int], None]
"""Hears how many ids a text has at least, between the parts of a long one; what it raises ends the tokenising."""

END = 0
"""The number of the end of generation in every unified vocabulary."""

_WORD = 32  # bytes
_LINE = 256  # bytes
_UTF8_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}
_SHORT = 64  # tokens
_LONG = 8192  # bytes
_FRAME = 1024  # bytes of stack for each byte of text; llama.cpp takes about 300
_ANCHORS = (b"\n", b"\x01", "\ufdd0".encode())
_HIDDEN = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_CHANGING = (b"hybriddna", b"whitespace")  # tokenizers whose tokens are not the bytes of the text
_STRIPPING = (b"phi-3", b"phi3")  # in the names of such models (llama_vocab::impl::load)
_USER_DEFINED = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
_MARKUP = re.compile(r"[<\[][|\uff5c].+[>\]]|[<\[].+[|\uff5c][>\]]")  # a bar, or DeepSeek's wide one
_PROBE = (
    "The quick brown fox doesn't jump over 13 lazy dogs, café naïve Straße 你好 Привет 🙂👍🏽\n\n"
    "  def f(x):\n\treturn x**2  # 3.14159e-10\n<b>HTTP</b> www.example.org; 1,234,567 ... \u200d ﬁ"
).encode()


def utf8_runs(text: bytes) -> Iterator[tuple[bytes, bool]]:
    """Split `text` into maximal runs of valid UTF-8 (True) and of bytes that are not, or not yet (False)."""
    while text:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            if error.start:
                yield text[: error.start], True
            yield text[error.start : error.end], False
            text = text[error.end :]
        else:
            yield text, True
            return


def added(count: int, watch: Watch) -> Watch:
    """Tell the same watch of so many ids more."""
    return lambda more: watch(count + more)


class Vocabulary:
    """The vocabulary of one model, read once when it is loaded.

    `pieces[id]` holds the bytes of a token, empty for control tokens and the like, whose ids are `empty`; `end_ids`
    are those that end a generation, `removed` those that the model itself says are never to be sampled; `control` maps
    the text of a control token to its id, `stripping` has those that swallow white space around them; `markup` has the
    texts of user-defined tokens that structure a prompt, which any tokenizer finds in any text; `bos` is the id that
    starts every context, or None; `expands` says that a text may have more tokens than bytes. Raises LoadError for a
    vocabulary that cannot be used.
    """

    def __init__(self, model: llama_cpp.llama_model_p, tokenizer: Path | None = None) -> None:
        self._pointer = llama_cpp.llama_model_get_vocab(model)
        self.kind = _KINDS.get(llama_cpp.llama_vocab_type(self._pointer), "none")
        if self.kind == "none":
            raise LoadError("it has no vocabulary, or one of a kind that is not known")
        self.size: int = llama_cpp.llama_vocab_n_tokens(self._pointer)
        self.pieces = read_pieces(self._pointer)
        lengths = np.fromiter(map(len, self.pieces), np.int64, self.size)
        lines = b"\n".join([*self.pieces, b""])
        first = np.frombuffer(lines, np.uint8)[np.cumsum(lengths + 1) - lengths - 1]
        brackets = np.flatnonzero(((first == ord("<")) | (first == ord("["))) & (lengths >= 3)).tolist()
        self.empty: list[int] = np.flatnonzero(lengths == 0).tolist()
        self.end_ids = find_end_ids(model, self.empty)
        self.removed = suppressed(self._pointer)
        self.bos = self._first_id()
        self._read_control_tokens()
        template = llama_cpp.llama_model_chat_template(model, None) or b""
        self.markup = self._find_markup(brackets, template.decode("utf-8", "replace"))
        self._added: list[bytes] = []  # tokens that a tokenizer of its own looks for in a text first
        self._in_flight = InFlight()
        encode = _llama_encoder(self._pointer, self._in_flight) if tokenizer is None else self._own_encoder(tokenizer)
        self._encode: Encoder = encode
        # Between two seams stands a word or two, and words come back.
        self._encode_word: Encoder = functools.lru_cache(1 << 14)(self._encode)
        model_kind = header_value(model, b"tokenizer.ggml.model")
        self._plain = tokenizer is None and self.kind in ("SPM", "BPE") and model_kind not in _CHANGING
        self.expands = tokenizer is not None or self.kind in ("UGM", "WPM")
        self._tokenizer = (header_value(model, b"tokenizer.ggml.pre"), _digest(tokenizer))
        self._byte_ids = self._find_byte_ids(np.flatnonzero(lengths == 1).tolist())
        if self.kind == "SPM" and tokenizer is None:
            self._check_byte_tokens()
        self.seams = Seams(b"\n" + lines, normalises=tokenizer is not None)
        self.adds_space = self.joined(self._encode(b"a")) == b" a"
        self._leave_out_seams(model, tokenizer)
        self._anchor, self._anchor_length = self._find_anchor() if self.adds_space else (b"", 0)

    def text_of(self, token: int) -> str:
        """The name of a token in the vocabulary, such as "<|im_end|>"."""
        return str(llama_cpp.llama_vocab_get_text(self._pointer, token).decode("utf-8", "replace"))

    def joined(self, ids: Sequence[int]) -> bytes:
        """The bytes that a sequence of ids stands for."""
        return b"".join([self.pieces[i] for i in ids])

    def encode(self, text: bytes, *, at_start: bool = False, watch: Watch = lambda _: None) -> list[int]:
        """The canonical ids of `text`; bytes that are not UTF-8 become single-byte tokens.

        `at_start` says that nothing stands before the text, where some vocabularies put a space of their own.
        Control tokens in the text stay text. A character whose bytes the vocabulary lacks (a control character in
        Falcon's) loses those bytes, as in the model's own tokenizer. Raises KeyError when the vocabulary lacks a byte
        that is not UTF-8; `can_write` tells so beforehand; and what `watch` raises.
        """
        if len(text) <= _WORD and not at_start and text.isascii():
            return self._encode_word(self._anchor + text)[self._anchor_length :]
        ids: list[int] = []
        for run, valid in utf8_runs(text):
            if not valid:
                ids += [self._byte_ids[byte] for byte in run]
            elif len(run) > LONG:
                ids += self._encode_long(run, at_start=at_start and not ids, watch=added(len(ids), watch))
            elif at_start and not ids:
                ids += self._encode(run)
            else:
                encode = self._encode_word if len(run) <= _WORD else self._encode
                ids += encode(self._anchor + run)[self._anchor_length :]
        return ids

    def _encode_long(self, text: bytes, *, at_start: bool, watch: Watch) -> list[int]:
        if self._encode is _closed:  # what cuts texts is read from the model when it is first needed
            _closed(text)
        watch(self._fewest(text))
        ids: list[int] = []
        for part in self._parts.of(text):
            watch(len(ids) + (self._fewest(part) if len(part) > LONG else 0))
            ids += self._encode(part) if at_start else self._encode(self._anchor + part)[self._anchor_length :]
            at_start = False
        return ids

    @functools.cached_property
    def _parts(self) -> Parts:
        if self._tokenizer[1]:
            return Parts([], [], self.seams, merges=False)
        tokens, pointer = range(self.size), self._pointer
        texts = [llama_cpp.llama_vocab_get_text(pointer, token) for token in tokens]
        attributes = [llama_cpp.llama_vocab_get_attr(pointer, token) for token in tokens]
        return Parts(texts, attributes, self.seams, merges=self.kind == "SPM")

    @functools.cached_property
    def _fewest(self) -> Callable[[bytes], int]:
        """How many tokens a text has at least, as far as that can be said without tokenising it."""
        if not self._plain or self._parts.strips:
            return lambda _: 0
        unseen = (self.text_of(token).encode() for token in self.empty)
        return Fewest([*self.pieces, *unseen]).of

    def can_write(self, strays: frozenset[int]) -> bool:
        """Whether the vocabulary has a token for each of these single bytes."""
        return strays <= self._byte_ids.keys()

    @functools.cached_property
    def identity(self) -> tuple[object, ...]:
        """Equal for two vocabularies that number, render and tokenise alike."""
        return (self.kind, self._tokenizer, self.adds_space, tuple(self.pieces), tuple(self.encode(_PROBE)))

    def close(self) -> None:
        """Note that the model is about to go: from now on `encode` raises RunError. Waits for one that is under way."""
        self._in_flight.end(self._forget)

    def _forget(self) -> None:
        self._encode = self._encode_word = _closed

    def _first_id(self) -> int | None:
        bos: int = llama_cpp.llama_vocab_bos(self._pointer)
        wanted = llama_cpp.llama_vocab_get_add_bos(self._pointer)
        return bos if wanted and bos != llama_cpp.LLAMA_TOKEN_NULL else None

    def _read_control_tokens(self) -> None:
        self.control: dict[str, int] = {}
        self.stripping: dict[int, tuple[bool, bool]] = {}
        for token in self.empty:
            attributes = llama_cpp.llama_vocab_get_attr(self._pointer, token)
            if attributes & _HIDDEN and (text := self.text_of(token)):
                self.control[text] = token
                left = bool(attributes & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP)
                right = bool(attributes & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP)
                if left or right:
                    self.stripping[token] = (left, right)

    def _find_markup(self, tokens: list[int], template: str) -> list[str]:
        markup = []
        for token in tokens:
            attributes, text = llama_cpp.llama_vocab_get_attr(self._pointer, token), self.text_of(token)
            if attributes & _USER_DEFINED and (_MARKUP.fullmatch(text) or text in template):
                markup.append(text)
        return markup

    def _own_encoder(self, path: Path) -> Encoder:
        tokenizer = _read_tokenizer(path)
        names = {token: name for name, token in tokenizer.get_vocab(with_added_tokens=True).items()}
        beyond = [name for token, name in names.items() if token >= self.size]
        if beyond:
            raise LoadError(f'{path}: its token "{beyond[0]}" is not in the GGUF, which has {self.size} tokens')
        for token in range(0, self.size, max(1, self.size // 4096)):
            if names.get(token, self.text_of(token)) != self.text_of(token):
                raise LoadError(
                    f'{path}: token {token} is "{names[token]}" here and "{self.text_of(token)}" in the GGUF: '
                    "the tokenizer belongs to another model"
                )
        added = tokenizer.get_added_tokens_decoder().values()
        self._added = [token.content.encode() for token in added if not token.special]
        return lambda text: list(tokenizer.encode(text.decode(), add_special_tokens=False).ids)

    def _leave_out_seams(self, model: llama_cpp.llama_model_p, tokenizer: Path | None) -> None:
        """Take away the seams behind which the tokenizer does more than to part words."""
        if header_value(model, b"tokenizer.ggml.model") == b"hybriddna":  # text within <dna> has tokens of its own
            self.seams.ascii = self.seams.other = self.seams.wide = False
        apart = self._added
        strips = any(name in header_value(model, b"general.name").lower() for name in _STRIPPING)
        if tokenizer is None and (self.adds_space or strips):
            # Spaces are added, or dropped, behind every token that is looked for in the text first.
            attribute = functools.partial(llama_cpp.llama_vocab_get_attr, self._pointer)
            apart = [piece for token, piece in enumerate(self.pieces) if piece and attribute(token) & _USER_DEFINED]
        for piece in apart:
            self.seams.leave_out(piece)

    def _find_byte_ids(self, single: list[int]) -> dict[int, int]:
        """The id of each byte's own token. A byte token goes before a character of the same byte."""
        found: dict[int, int] = {}
        for token in single:
            byte = self.pieces[token][0]
            is_byte = llama_cpp.llama_vocab_get_attr(self._pointer, token) & llama_cpp.LLAMA_TOKEN_ATTR_BYTE
            if is_byte or byte not in found:
                found[byte] = token
        return found

    def _check_byte_tokens(self) -> None:
        """Byte tokens stand for the characters without a token; where one is missing llama.cpp ends the process."""
        missing = sorted(_UTF8_BYTES - self._byte_ids.keys())
        if missing:
            raise LoadError(
                f"its vocabulary has no token for byte 0x{missing[0]:02X}, which llama.cpp needs to tokenise any text: "
                "give the member a tokenizer.json (tokenizer = ...), or use another conversion of the model"
            )

    def _find_anchor(self) -> tuple[bytes, int]:
        """A text that never merges with what follows, and its number of ids.

        Put in front and dropped again, it keeps the tokenizer from adding its space.
        """
        for anchor in _ANCHORS:
            ids = self._encode(anchor)
            alone = not any(anchor in piece and piece != anchor for piece in self.pieces)
            if alone and self.joined(self._encode(anchor + b"a")[len(ids) :]) == b"a":
                return anchor, len(ids)
        raise LoadError("its tokenizer puts a space in front of every text, and no anchor keeps it from that")


class TokenizedText:
    """The canonical ids of a growing text in one vocabulary.

    Ids in front of the last seam (see `seams`) are final, and only what follows is tokenised again. In a text without
    any, all of it is.
    """

    def __init__(self, vocabulary: Vocabulary, *, at_start: bool) -> None:
        self._vocabulary = vocabulary
        self._at_start = at_start
        self._ids = np.empty(1024, dtype=np.int32)
        self._final = 0  # ids in front of the last seam
        self._length = 0  # all ids
        self._seam = 0  # bytes in front of the last seam
        self._seen = 0  # bytes tokenised so far

    @property
    def final(self) -> int:
        """How many ids, from the first, no longer change when the text grows."""
        return self._final

    @property
    def saved(self) -> int:
        """By how many the ids of this text, and of all it may grow into, will at least be fewer than its bytes."""
        return self._seam - self._final

    def ids(self, text: bytes) -> IntArray:
        """Ids of `text`, which starts with the text of the call before: int32 view, shape (tokens,)."""
        if len(text) != self._seen:
            self._advance(text)
        return self._ids[: self._length]

    def _advance(self, text: bytes) -> None:
        seams = self._vocabulary.seams.find(text, self._seen)
        if len(text) - self._seen > _LINE:
            seams = seams[-1:]
        ids: list[int] = []
        for seam in seams:  # one by one: words come back, and so do their ids
            ids += self._encode(text[self._seam : seam])
            self._seam = seam
        self._final = self._write(self._final, ids)
        self._length = self._write(self._final, self._encode(text[self._seam :]))
        self._seen = len(text)

    def _encode(self, text: bytes) -> list[int]:
        return self._vocabulary.encode(text, at_start=self._at_start and self._seam == 0)

    def _write(self, position: int, ids: Sequence[int]) -> int:
        end = position + len(ids)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids[:position], np.empty(2 * end - position, dtype=np.int32)])
        self._ids[position:end] = ids
        return end


class SampledText:
    """The ids of a text as they were sampled, for members that all share one vocabulary: nothing to tokenise."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = np.empty(max(1024, 2 * len(ids)), dtype=np.int32)
        self._ids[: len(ids)] = ids
        self._length = len(ids)

    @property
    def final(self) -> int:
        """How many ids no longer change when the text grows: all of them."""
        return self._length

    @property
    def saved(self) -> int:
        """As in `TokenizedText`; nothing is known of the bytes."""
        return 0

    def append(self, token: int) -> None:
        """Add one sampled id."""
        if self._length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._length] = token
        self._length += 1

    def ids(self, text: bytes) -> IntArray:
        """All ids: int32 view, shape (tokens,). The text itself is not looked at."""
        return self._ids[: self._length]


class UnifiedVocabulary:
    """All pieces of all members, numbered once.

    `pieces[number]` are bytes, with `pieces[END]` empty; `numbers[member][id]` is int32, -1 for ids that are never
    sampled. Ids with the same bytes have the same number, and every end-of-generation id is END; but where
    `same` is true, all members share one vocabulary and each id keeps a number of its own, id + 1.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary]) -> None:
        self.same = all(v.identity == vocabularies[0].identity for v in vocabularies)
        self._number_of: dict[bytes, int] = {b"": END}
        self.numbers = tuple(self._numbers(vocabulary) for vocabulary in vocabularies)
        self.pieces: list[bytes] = [b"", *vocabularies[0].pieces] if self.same else list(self._number_of)

    def _numbers(self, vocabulary: Vocabulary) -> IntArray:
        numbers = np.arange(1, vocabulary.size + 1) if self.same else self._shared_numbers(vocabulary.pieces)
        numbers[vocabulary.empty] = -1
        numbers[vocabulary.removed] = -1
        numbers[vocabulary.end_ids] = END
        return numbers.astype(np.int32)

    def _shared_numbers(self, pieces: list[bytes]) -> npt.NDArray[np.int64]:
        known = self._number_of
        # A piece that is not known gets the number of those that are: known.setdefault(piece, len(known))
        numbers = map(known.setdefault, pieces, map(len, itertools.repeat(known)))
        return np.fromiter(numbers, np.int64, len(pieces))


_KINDS = {
    llama_cpp.LLAMA_VOCAB_TYPE_SPM: "SPM",
    llama_cpp.LLAMA_VOCAB_TYPE_BPE: "BPE",
    llama_cpp.LLAMA_VOCAB_TYPE_WPM: "WPM",
    llama_cpp.LLAMA_VOCAB_TYPE_UGM: "UGM",
    llama_cpp.LLAMA_VOCAB_TYPE_RWKV: "RWKV",
    llama_cpp.LLAMA_VOCAB_TYPE_PLAMO2: "PLaMo-2",
}


def _llama_encoder(pointer: llama_cpp.llama_vocab_p, in_flight: InFlight) -> Encoder:
    def tokenize(text: bytes) -> list[int]:
        size = max(_SHORT, len(text) + 8)
        buffer = (llama_cpp.llama_token * size)()
        length = llama_cpp.llama_tokenize(pointer, text, len(text), buffer, size, False, False)
        if length < 0:
            buffer = (llama_cpp.llama_token * -length)()
            length = llama_cpp.llama_tokenize(pointer, text, len(text), buffer, -length, False, False)
        return list(buffer[:length])

    def held(text: bytes) -> list[int]:
        with in_flight.use():
            in_flight.require_open()
            return tokenize(text)

    def encode(text: bytes) -> list[int]:
        return held(text) if len(text) <= _LONG else _on_a_deep_stack(held, text)

    return encode


_stack_size_lock = threading.Lock()


def _on_a_deep_stack(encode: Encoder, text: bytes) -> list[int]:
    """Tokenise a long text in a thread of its own, with a stack that is large enough.

    For some vocabularies (DeepSeek, GPT-NeoX, Aquila, ...) llama.cpp splits texts with std::regex, which recurses once
    for each character of a match: a run of 25,000 letters overflows an ordinary stack, and that ends the process.
    Only the part of the stack that is used takes memory. Raises InputError where the system refuses the stack.
    """
    with ThreadPoolExecutor(1) as pool:
        with _stack_size_lock:
            before = threading.stack_size((len(text) * _FRAME // 4096 + 1) * 4096)
            try:
                ids = pool.submit(encode, text)
            except RuntimeError:
                raise InputError(f"a text of {len(text):,} bytes is too long: no memory to tokenise it in") from None
            finally:
                threading.stack_size(before)
        return ids.result()


def _read_tokenizer(path: Path) -> Tokenizer:
    if path.exists() and not path.is_file():  # a device may have no end
        raise LoadError(f"{path}: not a regular file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise LoadError(f"{path}: not a tokenizer.json that the tokenizers library can read: {error}") from None
    tokenizer.encode_special_tokens = True  # a control token in a text stays text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _digest(path: Path | None) -> bytes | None:
    return hashlib.sha256(path.read_bytes()).digest() if path else None


def _closed(_: bytes) -> list[int]:
    raise RunError("the ensemble is closed")
