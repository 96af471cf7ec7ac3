"""Runs of valid UTF-8 in bytes that may be cut anywhere."""

from collections.abc import Iterator


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
