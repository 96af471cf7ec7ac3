"""Token ids and bytes: the vocabulary of one model, and the canonical ids of any bytes in it.

The contract: the shared state of an ensemble is bytes. A `Vocabulary` turns token ids into bytes (pieces) and any
bytes into the ids that its tokenizer gives them. `growing` does the second for a text that grows, `unified` numbers
the pieces of several vocabularies. Knows nothing of weights, contexts or sampling.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from me_local.errors import LoadError
from me_local.system.inflight import CLOSED, InFlight
from me_local.text.encoders import Encoder, closed, digest, llama_encoder, read_tokenizer
from me_local.text.parts import LONG, Fewest, Parts
from me_local.text.pieces import find_end_ids, header_value, read_pieces, suppressed
from me_local.text.seams import Seams
from me_local.text.thoughts import is_written
from me_local.text.utf8 import utf8_runs

Watch = Callable[[int], None]
"""Hears how many ids a text has at least, between the parts of a long one; what it raises ends the tokenising."""


_WORD = 32  # bytes
_UTF8_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}
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


def added(count: int, watch: Watch) -> Watch:
    """Tell the same watch of so many ids more."""
    return lambda more: watch(count + more)


class Vocabulary:
    """The vocabulary of one model, read once when it is loaded.

    `pieces[id]` holds the bytes of a token, empty for control tokens and the like, whose ids are `empty`; `end_ids`
    are those that end a generation, `removed` those that the model itself says are never to be sampled; `control` maps
    the text of a control token to its id, `stripping` has those that swallow white space around them; `markup` has the
    texts of user-defined tokens that structure a prompt, which any tokenizer finds in any text; `written` has the
    control tokens that the model writes in its thoughts, by their names, which are their pieces; `bos` is the id that
    starts every context, or None; `expands` says that a text may have more tokens than bytes. `replaced` has the values
    of the header that llama.cpp was given others for. Raises LoadError for a vocabulary that cannot be used.
    """

    def __init__(
        self, model: llama_cpp.llama_model_p, tokenizer: Path | None = None, replaced: Mapping[str, str] | None = None
    ) -> None:
        def header(key: bytes) -> bytes:
            name = key.decode()
            return replaced[name].encode() if replaced and name in replaced else header_value(model, key)

        self._pointer = llama_cpp.llama_model_get_vocab(model)
        self.kind = _KINDS.get(llama_cpp.llama_vocab_type(self._pointer), "none")
        if self.kind == "none":
            raise LoadError("it has no vocabulary, or one of a kind that is not known")
        self.size: int = llama_cpp.llama_vocab_n_tokens(self._pointer)
        self.pieces = read_pieces(self._pointer)
        lengths = np.fromiter(map(len, self.pieces), np.int64, self.size)
        unseen: list[int] = np.flatnonzero(lengths == 0).tolist()
        self.end_ids = find_end_ids(model, unseen, header)
        self._read_control_tokens(unseen)
        self._name_written_tokens()
        for name, token in self.written.items():
            lengths[token] = len(name)
        lines = b"\n".join([*self.pieces, b""])
        first = np.frombuffer(lines, np.uint8)[np.cumsum(lengths + 1) - lengths - 1]
        brackets = np.flatnonzero(((first == ord("<")) | (first == ord("["))) & (lengths >= 3)).tolist()
        self.empty: list[int] = np.flatnonzero(lengths == 0).tolist()
        self.removed = suppressed(self._pointer)
        self.bos = self._first_id()
        template = llama_cpp.llama_model_chat_template(model, None) or b""
        self.markup = self._find_markup(brackets, template.decode("utf-8", "replace"))
        self._open_encoder(tokenizer)
        model_kind = header(b"tokenizer.ggml.model")
        self._plain = tokenizer is None and self.kind in ("SPM", "BPE") and model_kind not in _CHANGING
        self.expands = tokenizer is not None or self.kind in ("UGM", "WPM")
        self._tokenizer = (header(b"tokenizer.ggml.pre"), digest(tokenizer))
        self._byte_ids = self._find_byte_ids(np.flatnonzero(lengths == 1).tolist())
        if self.kind == "SPM" and tokenizer is None:
            self._check_byte_tokens()
        self.seams = Seams(b"\n" + lines, normalises=tokenizer is not None)
        self.adds_space = self.joined(self._encode(b"a")) == b" a"
        self._leave_out_seams(header, tokenizer)
        self._anchor, self._anchor_length = self._find_anchor() if self.adds_space else (b"", 0)

    def _open_encoder(self, tokenizer: Path | None) -> None:
        self._added: list[bytes] = []  # tokens that a tokenizer of its own looks for in a text first
        self._in_flight = InFlight()
        self._closed = False
        encode = llama_encoder(self._pointer, self._in_flight) if tokenizer is None else self._own_encoder(tokenizer)
        self._encode: Encoder = encode
        # Between two seams stands a word or two, and words come back.
        self._encode_word: Encoder = functools.lru_cache(1 << 14)(self._encode)

    def text_of(self, token: int) -> str:
        """The name of a token in the vocabulary, such as "<|im_end|>"."""
        return str(llama_cpp.llama_vocab_get_text(self._pointer, token).decode("utf-8", "replace"))

    def joined(self, ids: Sequence[int]) -> bytes:
        """The bytes that a sequence of ids stands for."""
        return b"".join([self.pieces[i] for i in ids])

    def spelled(self, ids: Sequence[int]) -> bytes:
        """The text whose canonical ids these may be: without a space that the tokenizer put in front of it."""
        joined = self.joined(ids)
        puts_space = joined.startswith(b" ") and self.joined(self.encode(joined[1:], at_start=True)) == joined
        return joined[1:] if puts_space else joined

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

    def canonical(self, text: bytes, *, typed: int = 0, at_start: bool = False) -> list[int]:
        """The canonical ids of a reply's text, whose first `typed` bytes a user wrote; for the rest as `encode`.

        Behind these the names of `written` control tokens are these tokens, in front they are text.
        """
        ids: list[int] = []
        end = 0
        for name in self._names.finditer(text, typed) if self._names else ():
            ids += self.encode(text[end : name.start()], at_start=at_start and not ids)
            ids.append(self.written[name.group()])
            end = name.end()
        return ids + self.encode(text[end:], at_start=at_start and not ids)

    def _encode_long(self, text: bytes, *, at_start: bool, watch: Watch) -> list[int]:
        if self._closed:  # what cuts texts is read from the model when it is first needed
            self._encode(text)
        watch(self._fewest(text))
        ids: list[int] = []
        for part in self._parts.of(text):
            watch(len(ids) + (self._fewest(part) if len(part) > LONG else 0))
            ids += self._encode(part) if at_start else self._encode(self._anchor + part)[self._anchor_length :]
            at_start = False
        return ids

    @functools.cached_property
    def ids_of(self) -> dict[bytes, list[int]]:
        """The ids of each piece."""
        found: dict[bytes, list[int]] = {}
        for token, piece in enumerate(self.pieces):
            if piece:
                found.setdefault(piece, []).append(token)
        return found

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

    def close(self, reason: str | None = None) -> None:
        """Note that the model is about to go: from now on `encode` raises RunError. Waits for one that is under way."""
        self._in_flight.end(functools.partial(self._forget, reason or CLOSED), reason)

    def _forget(self, reason: str) -> None:
        if not self._closed:
            self._encode = self._encode_word = closed(reason)
            self._closed = True

    def _first_id(self) -> int | None:
        bos: int = llama_cpp.llama_vocab_bos(self._pointer)
        wanted = llama_cpp.llama_vocab_get_add_bos(self._pointer)
        return bos if wanted and bos != llama_cpp.LLAMA_TOKEN_NULL else None

    def _read_control_tokens(self, unseen: Sequence[int]) -> None:
        self.control: dict[str, int] = {}
        self.stripping: dict[int, tuple[bool, bool]] = {}
        for token in unseen:
            attributes = llama_cpp.llama_vocab_get_attr(self._pointer, token)
            if attributes & _HIDDEN and (text := self.text_of(token)):
                self.control[text] = token
                left = bool(attributes & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP)
                right = bool(attributes & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP)
                if left or right:
                    self.stripping[token] = (left, right)

    def _name_written_tokens(self) -> None:
        """Give the control tokens that a model writes in its thoughts the bytes of their names."""
        names = [name for name in self.control if is_written(name, self.pieces)]
        self.written = {name.encode(): self.control[name] for name in names if self.control[name] not in self.end_ids}
        for name, token in self.written.items():
            self.pieces[token] = name
        longest_first = sorted(self.written, key=len, reverse=True)
        self._names = re.compile(b"|".join(map(re.escape, longest_first))) if self.written else None

    def _find_markup(self, tokens: list[int], template: str) -> list[str]:
        markup = []
        for token in tokens:
            attributes, text = llama_cpp.llama_vocab_get_attr(self._pointer, token), self.text_of(token)
            if attributes & _USER_DEFINED and (_MARKUP.fullmatch(text) or text in template):
                markup.append(text)
        return markup

    def _own_encoder(self, path: Path) -> Encoder:
        tokenizer = read_tokenizer(path)
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

    def _leave_out_seams(self, header: Callable[[bytes], bytes], tokenizer: Path | None) -> None:
        """Take away the seams behind which the tokenizer does more than to part words."""
        if header(b"tokenizer.ggml.model") == b"hybriddna":  # text within <dna> has tokens of its own
            self.seams.ascii = self.seams.other = self.seams.wide = False
        apart = self._added
        strips = any(name in header(b"general.name").lower() for name in _STRIPPING)
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


_KINDS = {
    llama_cpp.LLAMA_VOCAB_TYPE_SPM: "SPM",
    llama_cpp.LLAMA_VOCAB_TYPE_BPE: "BPE",
    llama_cpp.LLAMA_VOCAB_TYPE_WPM: "WPM",
    llama_cpp.LLAMA_VOCAB_TYPE_UGM: "UGM",
    llama_cpp.LLAMA_VOCAB_TYPE_RWKV: "RWKV",
    llama_cpp.LLAMA_VOCAB_TYPE_PLAMO2: "PLaMo-2",
}
