"""What llama-server tells besides replies, as far as it makes sense for an ensemble: ids, prompts and places.

Ids and prompts are those of one member, "me-local/NAME"; without a name where all members share a vocabulary, or there
is one alone.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from me_local.asking import check_conversation, parted
from me_local.config import Overrides, check
from me_local.ensemble import Ensemble
from me_local.server.fields import Loose, bounded_texts
from me_local.server.keeping import About
from me_local.server.protocol import MODEL, ChatMessage, as_messages
from me_local.server.refusals import ApiError

_MOST_TOKENS = 1 << 20


class _Body(Loose):
    model: str = MODEL


class Tokenize(_Body):
    """A body of POST /tokenize."""

    content: str
    with_pieces: bool = False


class Detokenize(_Body):
    """A body of POST /detokenize."""

    tokens: Annotated[list[int], Field(max_length=_MOST_TOKENS)]


class ApplyTemplate(_Body):
    """A body of POST /apply-template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(bounded_texts)]
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(max_length=256)] = None


def tokenize(ensemble: Ensemble, asked: Tokenize) -> dict[str, Any]:
    """The ids of a text, in which nothing becomes a control token."""
    vocabulary = ensemble.members[_member(ensemble, asked.model)].vocabulary
    ids = vocabulary.encode(asked.content.encode(), at_start=True)
    if not asked.with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": id_, "piece": _piece(vocabulary.pieces[id_])} for id_ in ids]}


def detokenize(ensemble: Ensemble, asked: Detokenize) -> dict[str, Any]:
    """The text of ids; control tokens have none."""
    vocabulary = ensemble.members[_member(ensemble, asked.model)].vocabulary
    if not all(0 <= id_ < vocabulary.size for id_ in asked.tokens):
        raise ApiError(400, f"tokens: there are ids from 0 to {vocabulary.size - 1}", param="tokens")
    return {"content": vocabulary.joined(asked.tokens).decode("utf-8", "replace")}


def apply_template(ensemble: Ensemble, asked: ApplyTemplate) -> dict[str, Any]:
    """The prompt of a conversation as a member's template writes it."""
    messages, head = parted(as_messages(asked.messages))
    check_conversation(messages)
    member = _member(ensemble, asked.model)
    given = check("template_args", asked.chat_template_kwargs or {}, "chat_template_kwargs")
    config = ensemble.with_overrides(Overrides(template_args=given))
    arguments = {**config.template_args, **config.members[member].template_args}
    text = ensemble.writers[member].text(messages, arguments)
    return {"prompt": text + head.decode()}


def props(about: About) -> dict[str, Any]:
    """The ensemble as llama-server describes its model."""
    return {
        "model_alias": MODEL,
        "total_slots": about.places,
        "default_generation_settings": {"n_ctx": min(about.contexts)},
        "members": [{"name": name, "n_ctx": n_ctx} for name, n_ctx in zip(about.names, about.contexts, strict=True)],
    }


def slots(about: About, places: Sequence[int | None]) -> list[dict[str, Any]]:
    """The places for replies as llama-server describes its slots, by how many pieces each has so far."""
    return [
        {
            "id": number,
            "n_ctx": min(about.contexts),
            "speculative": False,
            "is_processing": pieces is not None,
            "next_token": {"has_next_token": pieces is not None, "n_decoded": pieces or 0},
        }
        for number, pieces in enumerate(places)
    ]


def _member(ensemble: Ensemble, model: str) -> int:
    name = model.removeprefix(f"{MODEL}/")
    if name != model and name in ensemble.names:
        return ensemble.names.index(name)
    if model == MODEL and (len(ensemble.members) == 1 or ensemble.engine.unified.same):
        return 0
    known = ", ".join(f"{MODEL}/{name}" for name in ensemble.names)
    raise ApiError(400, f"model: say which member's: {known}", param="model", code="model_not_found")


def _piece(piece: bytes) -> str | list[int]:
    """As llama-server has it: text, or bytes where it is none."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
