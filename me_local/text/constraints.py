"""Constraints: which bytes may come next in a reply that has to be JSON, to match a pattern, or to follow a grammar.

A constraint is a set of texts. It is followed byte by byte (llguidance), so that one matcher serves all members,
whatever their vocabularies: a piece may come next if some text of the set goes on with its bytes, and the reply may end
where it is such a text. Bytes that come next in any case are *forced*. Knows nothing of tokens or of members.
"""

import json
from functools import lru_cache
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from me_local.config import Constraint
from me_local.errors import InputError, RunError

_TOKENIZER = llguidance.LLTokenizer("byte")  # a token for each byte
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write each value: bytes between values are then forced, and no model is lost in white space."""
_OBJECT = {"type": "object"}
_LONGEST = 1 << 20  # bytes of a constraint
_LONGEST_REASON = 200  # characters


class Matcher:
    """Follows one reply. `append` what was written; the others tell what may come next."""

    def __init__(self, fresh: Any) -> None:
        self._matcher = fresh
        self._forced: bytes | None = None

    def allows(self, piece: bytes) -> bool:
        """Whether these bytes, all of them, may come next."""
        return bool(self._matcher.validate_tokens(list(piece)) == len(piece))

    def may_end(self) -> bool:
        """Whether the text so far is whole."""
        return bool(self._matcher.is_accepting())

    def is_over(self) -> bool:
        """Whether the text so far is whole, and nothing can come behind it. Raises RunError at a limit."""
        self._require_sound()
        return bool(self._matcher.is_stopped())

    def forced(self) -> bytes:
        """The bytes that come next in any case."""
        if self._forced is None:
            open_ = self._matcher.is_stopped() or self._matcher.is_accepting()  # where it may end, nothing is forced
            self._forced = b"" if open_ else bytes(self._matcher.compute_ff_bytes())
        return self._forced

    def append(self, piece: bytes) -> None:
        """Go on behind these bytes, which it allows. Raises RunError at a limit."""
        self._forced = None
        self._matcher.consume_tokens(list(piece))
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise RunError(f"the constraint cannot be followed any further: {_reason(self._matcher.get_error())}")


def start(constraint: Constraint) -> Matcher:
    """A matcher at the beginning of a reply. Raises InputError for a constraint that cannot be used."""
    return Matcher(_compiled(constraint.kind, constraint.text).deep_copy())


@lru_cache(256)
def _compiled(kind: str, text: str) -> Any:
    if len(text.encode()) > _LONGEST:
        raise InputError(f"{kind}: a constraint has at most {_LONGEST >> 20} MB")
    try:
        grammar = _grammar(kind, text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{kind}: {_reason(str(error))}") from None
    matcher = llguidance.LLMatcher(_TOKENIZER, grammar, log_level=0)
    if matcher.is_error():
        raise InputError(f"{kind}: {_reason(matcher.get_error())}")
    return matcher


def _grammar(kind: str, text: str) -> str:
    """What llguidance compiles. Raises ValueError."""
    if kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE)
    if kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema(_OBJECT, overrides=_JSON_STYLE)
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        choices = " | ".join(json.dumps(choice) for choice in json.loads(text))
        return llguidance.LLMatcher.grammar_from_lark(f"start: {choices}")
    return llguidance.LLMatcher.grammar_from_lark(any_to_lark(text))


def _reason(text: str) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + " ..."
