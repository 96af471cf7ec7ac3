"""The fields by which clients ask for JSON, a pattern, a choice or a grammar: OpenAI's, llama-server's and vLLM's.

All of them mean one thing, a constraint of the reply. Knows nothing of how it is kept.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from me_local.config import Constraint
from me_local.errors import InputError
from me_local.text import constraints

Schema = dict[str, Any] | bool
Choice = Annotated[list[str], Field(min_length=1, max_length=1000)]


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class NamedSchema(_Object):
    """A schema as OpenAI wraps it; `strict` changes nothing, as every schema is kept."""

    schema_: Annotated[Schema, Field(alias="schema")] = True
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Object):
    """What a reply has to be: OpenAI's, with llama-server's `schema` beside it."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    pattern: str | None = None
    grammar: str | None = None


class StructuredOutputs(_Object):
    """vLLM's."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Structure(BaseModel):
    """All these fields of a request."""

    response_format: ResponseFormat | None = None
    json_schema: Schema | None = None
    grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None

    def constraint(self) -> Constraint | None:
        """What the fields ask for. Raises InputError for two at once, and for one that cannot be kept."""
        asked = [(name, constraint) for name, constraint in self._asked() if constraint is not None]
        if len(asked) > 1:
            raise InputError(f"{asked[1][0]}: only one of it and {asked[0][0]} can be kept")
        if not asked:
            return None
        name, constraint = asked[0]
        try:
            constraints.start(constraint)
        except InputError as error:
            reason = str(error).removeprefix(f"{constraint.kind}: ")
            raise InputError(f"{name}: {reason}") from None
        return constraint

    def _asked(self) -> list[tuple[str, Constraint | None]]:
        outputs = self.structured_outputs or StructuredOutputs()
        return [
            ("response_format", _of_format(self.response_format)),
            ("json_schema", _schema(self.json_schema)),
            ("grammar", _text("grammar", self.grammar)),
            ("guided_json", _schema(self.guided_json)),
            ("guided_regex", _text("regex", self.guided_regex)),
            ("guided_choice", _choice(self.guided_choice)),
            ("guided_grammar", _text("grammar", self.guided_grammar)),
            ("structured_outputs", _schema(outputs.json_)),
            ("structured_outputs", _text("regex", outputs.regex)),
            ("structured_outputs", _choice(outputs.choice)),
            ("structured_outputs", _text("grammar", outputs.grammar)),
            ("structured_outputs", Constraint("json_object") if outputs.json_object else None),
        ]


def _of_format(wanted: ResponseFormat | None) -> Constraint | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" and wanted.schema_ is None:
        return Constraint("json_object")
    if wanted.type in ("json_object", "json_schema"):
        schema = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
        if schema is None:
            raise InputError("response_format: json_schema is missing")
        return _schema(schema)
    text = wanted.pattern if wanted.type == "regex" else wanted.grammar
    if text is None:
        raise InputError(f"response_format: {'pattern' if wanted.type == 'regex' else 'grammar'} is missing")
    return _text("regex" if wanted.type == "regex" else "grammar", text)


def _schema(schema: Schema | str | None) -> Constraint | None:
    if schema is None:
        return None
    return Constraint("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def _choice(choice: list[str] | None) -> Constraint | None:
    return None if choice is None else Constraint("choice", json.dumps(choice))


def _text(kind: Literal["regex", "grammar"], text: str | None) -> Constraint | None:
    return None if text is None else Constraint(kind, text)
