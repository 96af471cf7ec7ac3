r"""Finding the answer in a reply.

The protocol is that of "Rethinking LLM Ensembling from the Perspective of Mixture Models": the answer is what the last
\boxed{} holds; without one, what the whole reply holds last: a letter in brackets, else a letter by itself; a number;
or one of two words. Where this differs from the authors' code
(github.com/Kamichanw/Mixture-model-like-Ensemble, tasks/):

- braces in a box may be nested or escaped, and a box that is blank or never closed does not count;
- a letter must be one of the choices that the question has (there: A to D, in BIG-Bench Hard A to Z), and a box that
  begins "C. A dog" chooses C (there: the last, A);
- a number keeps its fraction (there: rounded in GSM8K) and its sign, also a Unicode minus (there: lost in BIG-Bench
  Hard); thousands may be separated as LaTeX does it; a heading "### 2" is no answer (there, the first such one is);
- a text loses LaTeX's wrapping, repeated white space and a full stop at its end.
"""

import re

from me_local.errors import InputError

_BOX = re.compile(r"boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_SEPARATOR = re.compile(r"(?<=[0-9])(?:,|\{,\}|\\[,!;: ]|[\u00a0\u2009\u202f])+(?=[0-9])")
# A minus behind a word, a number or a bracket is a hyphen, a range or a difference.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?(?:\\?[$£€¥])?(?:(?P<whole>[0-9]+)(?:\.(?P<part>[0-9]+))?|(?<!\w)\.(?P<only>[0-9]+))"
)
_MINUS = str.maketrans({"\u2212": "-", "\u2011": "-", "\u2013": "-"})
_WRAPPED = re.compile(r"\\(?:text|math|operatorname|emph|boldsymbol)[a-z]*\s*\{([^{}]*)\}")
_ESCAPED = re.compile(r"\\([{}&%$#_])")
_SPACE = re.compile(r"\\[ ,;:!]|\s+")
_ENDING = re.compile(r"\A(.*\banswer is )([^\n]+?)\.?\s*\Z", re.DOTALL)


def boxed(reply: str) -> str | None:
    r"""What the last \boxed{} that is closed and not blank holds."""
    for match in reversed(list(_BOX.finditer(reply))):
        content = _braced(reply, match.end())
        if content is not None and content.strip():
            return content.strip()
    return None


def letter(reply: str, count: int) -> str | None:
    """The letter that a reply chooses of the first `count` ones; a box without one counts as it stands."""
    box = boxed(reply)
    text = reply if box is None else box
    one = f"([A-{chr(ord('A') + count - 1)}])"
    if box is not None and (opening := re.match(rf"\(?{one}[.:)]", plain(box))):
        return opening[1]
    for pattern in (rf"\({one}\)", rf"(?<![^\W_]){one}(?![^\W_])"):
        if found := re.findall(pattern, text):
            return str(found[-1])
    return box


def number(text: str) -> str | None:
    """The last number in a text, as equal numbers are written alike: "-1,250.50" becomes "-1250.5".

    Separators of thousands, zeros in front of it and at the end of a fraction, and signs of currencies are left out.
    """
    found = list(_NUMBER.finditer(_SEPARATOR.sub("", text.translate(_MINUS))))
    if not found:
        return None
    last = found[-1]
    whole = (last["whole"] or "").lstrip("0") or "0"
    part = (last["part"] or last["only"] or "").rstrip("0")
    size = f"{whole}.{part}" if part else whole
    return f"-{size}" if last["sign"] and size != "0" else size


def word(text: str, words: tuple[str, ...]) -> str | None:
    """The last of `words` in a text: as they are spelt, else in any case; in the spelling of `words`."""
    pattern = rf"(?<![^\W_])(?:{'|'.join(map(re.escape, words))})(?![^\W_])"
    for flags in (re.NOFLAG, re.IGNORECASE):
        if found := re.findall(pattern, text, flags):
            return next(word for word in words if word.lower() == found[-1].lower())
    return None


def plain(text: str) -> str:
    """A text without LaTeX's wrapping and escapes, dollar signs around it, repeated white space and a final stop."""
    unwrapped = _WRAPPED.sub(r"\1", text)
    while unwrapped != text:
        text, unwrapped = unwrapped, _WRAPPED.sub(r"\1", unwrapped)
    spaced = _SPACE.sub(" ", text.strip().strip("$"))
    return _ESCAPED.sub(r"\1", spaced).strip().removesuffix(".").rstrip()


def box_ending(solution: str, where: str) -> tuple[str, str]:
    r"""A solution that ends "… answer is X." with X put into \boxed{}, and X. Raises InputError for other endings."""
    match = _ENDING.match(solution)
    if match is None:
        raise InputError(f'{where}: the solution must end with "The answer is …."')
    escaped = re.sub(r"[{}]", r"\\\g<0>", match[2])
    return f"{match[1]}\\boxed{{{escaped}}}.", match[2]


def _braced(text: str, start: int) -> str | None:
    """What stands from `start`, behind an opening brace, up to the brace that closes it."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return None
