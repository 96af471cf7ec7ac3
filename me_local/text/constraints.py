"""Constraints: which bytes may come next in a reply that has to be JSON, to match a pattern, or to follow a grammar.

A constraint is a set of texts. It is followed byte by byte (llguidance), so that one matcher serves all members,
whatever their vocabularies: a piece may come next if some text of the set goes on with its bytes, and the reply may end
where it is such a text. Bytes that come next in any case are *forced*. Knows nothing of tokens or of members.
"""

import copy
import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Literal, Self, get_args

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from me_local.config import Constraint, ConstraintKind
from me_local.errors import InputError, RunError
from me_local.text.utf8 import utf8_runs

_TOKENIZER = llguidance.LLTokenizer("byte")  # a token for each byte
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write each value: bytes between values are then forced, and no model is lost in white space."""
_OBJECT = {"type": "object"}
_MOST_PROPERTIES = 2000  # of an object: the time to compile them grows with their square
_MOST_STATES = 100_000  # a multiple of n is found by n states, one of two numbers by their least common multiple
_DEAD_END = "NoExtension"
_REASON_LENGTH = 200  # characters
LONGEST = 1 << 18
"""Bytes of a constraint."""
_CONTEXT = re.compile(r"^\s*(?:\d+ \| |<state>)", re.MULTILINE)
"""Where an error begins to show the grammar that was made of a constraint, or the state of the parser."""


class Matcher:
    """Follows one reply. `append` what was written; the others tell what may come next.

    All raise RunError at a limit, where the matcher says no to everything.
    """

    def __init__(self, fresh: Any) -> None:
        self._matcher = fresh
        self._forced: bytes | None = None

    def copy(self) -> Self:
        """Another that goes on from here; the two share their states, and the limit on their number."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def allows(self, piece: bytes) -> bool:
        """Whether these bytes, all of them, may come next."""
        if self._matcher.validate_tokens(list(piece)) == len(piece):
            return True
        self._require_sound()
        return False

    def following(self, text: bytes = b"") -> npt.NDArray[np.bool_]:
        """Which bytes may come next, or behind a text that it allows: bool (256,)."""
        matcher = self._matcher
        if text:
            matcher = matcher.deep_copy()
            matcher.consume_tokens(list(text))
        bias = matcher.compute_logit_bias()
        self._require_sound()
        return np.frombuffer(bias, np.uint8, 256) > 0

    def may_end(self) -> bool:
        """Whether the text so far is whole."""
        self._require_sound()
        return bool(self._matcher.is_accepting())

    def is_over(self) -> bool:
        """Whether the text so far is whole, and nothing can come behind it."""
        self._require_sound()
        return bool(self._matcher.is_stopped())

    def forced(self) -> bytes:
        """The whole characters that come next in any case; for use where the text does not end inside of one."""
        if self._forced is None:
            open_ = self._matcher.is_stopped() or self._matcher.is_accepting()  # where it may end, nothing is forced
            forced = b"" if open_ else self._matcher.compute_ff_bytes()
            self._forced = _whole_characters(forced)
            self._require_sound()
        return self._forced

    def append(self, piece: bytes) -> None:
        """Go on behind these bytes, which it allows."""
        self._forced = None
        self._matcher.consume_tokens(list(piece))
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise RunError(f"the constraint cannot be followed any further: {_reason(self._matcher.get_error())}")


class MatcherBehindThought(Matcher):
    """The same for a reply that begins inside a thought.

    The thought is free up to its `closing` mark, and so is white space behind it. The reply cannot end there.
    """

    def __init__(self, fresh: Any, closing: bytes) -> None:
        super().__init__(fresh)
        self._closing = closing
        self._tail = b""  # of the thought
        self._place: Literal["thought", "gap", "answer"] = "thought"

    def allows(self, piece: bytes) -> bool:
        """Whether these bytes, all of them, may come next."""
        if self._place == "answer":
            return super().allows(piece)
        rest = self._behind_gap(piece)
        return not rest or super().allows(rest)

    def following(self, text: bytes = b"") -> npt.NDArray[np.bool_]:
        """Which bytes may come next, or behind a text that it allows: bool (256,); in a thought all of them."""
        if self._place == "thought":
            return np.ones(256, dtype=np.bool_)
        if self._place == "answer" or text.strip():
            return super().following(text if self._place == "answer" else text.lstrip())
        return super().following() | _WHITE_SPACE

    def may_end(self) -> bool:
        """Whether the text so far is whole."""
        return self._place != "thought" and super().may_end()

    def is_over(self) -> bool:
        """Whether the text so far is whole, and nothing can come behind it."""
        return self._place != "thought" and super().is_over()

    def forced(self) -> bytes:
        """The whole characters that come next in any case; for use where the text does not end inside of one."""
        return b"" if self._place == "thought" else super().forced()

    def append(self, piece: bytes) -> None:
        """Go on behind these bytes, which it allows."""
        if self._place == "answer":
            super().append(piece)
            return
        rest = self._behind_gap(piece)
        thought = self._tail + piece
        self._tail = thought[1 - len(self._closing) :]
        if self._closing in thought:
            self._place = "gap"
        if rest:
            self._place = "answer"
            super().append(rest)

    def _behind_gap(self, piece: bytes) -> bytes:
        """What of a piece stands behind the thought, and behind the white space that follows it."""
        if self._place == "gap":
            return piece.lstrip()
        return (self._tail + piece).partition(self._closing)[2].lstrip()


_WHITE_SPACE = np.isin(np.arange(256), list(b" \t\n\v\f\r"))


def start(constraint: Constraint, closing: bytes = b"") -> Matcher:
    """A matcher at the beginning of a reply, or behind the thought that `closing` ends.

    Raises InputError for a constraint that cannot be used.

    Each reply has one of its own, which takes about a millisecond. Copies of a compiled one would share its states, and
    a limit on their number: a reply would end in an error because of what other replies wrote.
    """
    kind = constraint.kind
    if kind not in get_args(ConstraintKind) or not isinstance(constraint.text, str):
        raise InputError(f"a constraint is a text of a kind: {', '.join(get_args(ConstraintKind))}")
    try:
        if (size := len(constraint.text.encode())) > LONGEST:
            raise InputError(f"{kind}: has {size} bytes, and there may be {LONGEST}")
        matcher = llguidance.LLMatcher(_TOKENIZER, _grammar(kind, constraint.text), log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias(), matcher.compute_ff_bytes()  # which may meet a limit, or no byte
        if matcher.is_error():
            raise ValueError(matcher.get_error())
    except UnicodeEncodeError:
        raise InputError(f"{kind}: has a half of a character (a lone surrogate)") from None
    except RecursionError:
        raise InputError(f"{kind}: is nested too deeply") from None
    except (ValueError, GbnfToLarkError) as error:
        raise InputError(f"{kind}: {_reason(str(error))}") from None
    return MatcherBehindThought(matcher, closing) if closing else Matcher(matcher)


def _grammar(kind: str, text: str) -> str:
    """What llguidance compiles. Raises ValueError, GbnfToLarkError and RecursionError."""
    if kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema(_OBJECT, overrides=_JSON_STYLE)
    if kind == "json_schema":
        schema = _parsed(text)
        if schema is not True and not isinstance(schema, dict):
            raise ValueError("must be a JSON object")
        _check_cost(schema)
        return llguidance.LLMatcher.grammar_from_json_schema("{}" if schema is True else text, overrides=_JSON_STYLE)
    if kind == "choice":
        return llguidance.LLMatcher.grammar_from_lark(_one_of(_parsed(text)))
    if not text:
        raise ValueError("is empty")
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    for match in re.finditer(r"%json\s*", text):
        _check_cost(json.JSONDecoder().raw_decode(text, match.end())[0])
    return llguidance.LLMatcher.grammar_from_lark(any_to_lark(text))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _one_of(choices: Any) -> str:
    """A grammar of some texts. As a terminal they are one pattern; as a rule there may be 2,000 of them."""
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("must be a list of texts, one at least")
    quoted = (json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f") for choice in choices)
    return f"start: CHOICE\nCHOICE: {' | '.join(quoted)}"


def _check_cost(schema: Any) -> None:
    """Raise ValueError for a schema that would take more than seconds to compile."""
    numbers: list[Decimal] = []
    for table in _tables(schema):
        properties = table.get("properties")
        if isinstance(properties, dict) and len(properties) > _MOST_PROPERTIES:
            raise ValueError(f"an object has {len(properties)} properties, and there may be {_MOST_PROPERTIES}")
        number = table.get("multipleOf")
        if isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf:
            numbers.append(Decimal(str(number)))
    if numbers:
        exponent = min(0, *(int(number.as_tuple().exponent) for number in numbers))
        scaled = [int(number.scaleb(-exponent)) for number in numbers]
        if math.lcm(*scaled) > _MOST_STATES or sum(map(_digits, numbers)) > _MOST_STATES:
            raise ValueError(f"its multipleOf take more than {_MOST_STATES} states")


def _digits(number: Decimal) -> int:
    return int("".join(map(str, number.as_tuple().digits)))


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def _whole_characters(text: bytes) -> bytes:
    """The beginning of some bytes up to the last whole character."""
    run, valid = next(utf8_runs(text), (b"", True))
    return run if valid else b""


def _reason(text: str) -> str:
    """An error of llguidance in one line, without what it shows of its own inside."""
    if text.startswith(_DEAD_END):
        return "no text fulfils it"
    found = _CONTEXT.search(text)
    text = text[: found.start()] if found and found.start() else text
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _REASON_LENGTH else line[:_REASON_LENGTH] + " ..."
