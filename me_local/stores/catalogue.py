"""What is on this machine: the models of all stores, with what their headers say."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from me_local.gguf import DamagedError
from me_local.stores import folders, hub, llama_cpp_cache, lm_studio, ollama
from me_local.stores.entry import Entry
from me_local.stores.facts import Facts, Reader

STORES: dict[str, Callable[[], Iterator[Entry]]] = {
    store.STORE: store.entries for store in (ollama, lm_studio, hub, llama_cpp_cache, folders)
}


@dataclass(frozen=True, slots=True)
class Found:
    """A model on this machine: where it lies, what its header says, and its size in bytes.

    `problem` says why it can be no member, if it cannot; where its file cannot be read, there are no `facts`.
    """

    entry: Entry
    facts: Facts | None
    size: int
    problem: str


def found() -> list[Found]:
    """All models of all stores. A broken file is one with a problem; headers alone are read."""
    reader = Reader()
    return [look(entry, reader) for entry in entries()]


def entries() -> Iterator[Entry]:
    """The models of all stores by their names; no file of a model is opened."""
    for store in STORES.values():
        yield from store()


def look(entry: Entry, reader: Reader) -> Found:
    """An entry with what its header says; a header that was read before is read faster by the same reader."""
    size = sum(os.path.getsize(file) for file in entry.files if os.path.exists(file))
    if entry.problem:
        return Found(entry, None, size, entry.problem)
    try:
        facts = reader.read(entry.files)
    except DamagedError as error:
        return Found(entry, None, size, str(error))
    return Found(entry, facts, size, facts.unfit)
