"""Structured output: what a body asks answers to look like, as a grammar."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator

from onebase.serve.api.errors import bad_request
from onebase.serve.api.schemas import Body
from onebase.serve.engine.grammar_bounds import MAX_SOURCE
from onebase.serve.engine.messages import Grammar

ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def _schema_text(value: Any) -> str:
    """Where bodies are validated, which is in a thread where they are long."""
    if not isinstance(value, dict):
        raise ValueError("a JSON schema must be an object")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _schema_or_text(value: Any) -> str:
    return value if isinstance(value, str) else _schema_text(value)


_Bounded = StringConstraints(min_length=1, max_length=MAX_SOURCE)
Source = Annotated[str, _Bounded]
SchemaText = Annotated[str, _Bounded, BeforeValidator(_schema_text), WithJsonSchema({"type": "object"})]
SchemaOrText = Annotated[
    str, _Bounded, BeforeValidator(_schema_or_text), WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})
]
Alternative = Annotated[str, StringConstraints(min_length=1)]


class JsonSchema(Body):
    """OpenAI's ``json_schema``. Every schema is enforced, strict or not: a keyword that cannot be is refused."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, StringConstraints(max_length=4096)] | None = None
    schema_: SchemaText | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Free text, as without it."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's field: exactly one of them. grammar: in llguidance's dialect of Lark."""

    json_: SchemaOrText | None = Field(default=None, alias="json")
    regex: Source | None = None
    choice: Annotated[list[Alternative], Field(min_length=1, max_length=10_000)] | None = None
    grammar: Source | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name, value in self.model_dump(by_alias=True).items() if value is not None]
        if len(given) != 1:
            raise bad_request(
                f"structured_outputs takes exactly one of json, regex, choice, grammar and json_object; "
                f"given: {', '.join(given) or 'none'}.",
                "structured_outputs",
            )
        return self

    @property
    def field(self) -> str:
        """The path of the one that is given."""
        (name,) = (name for name, value in self.model_dump(by_alias=True).items() if value is not None)
        return f"structured_outputs.{name}"

    @property
    def wanted(self) -> Grammar:
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.grammar is not None:
            return Grammar("lark", self.grammar)
        if self.choice is not None:
            return one_of(self.choice)
        return ANY_OBJECT if self.json_ is None else Grammar("json_schema", self.json_)


def one_of(texts: list[str]) -> Grammar:
    """As one terminal: alternatives of a rule cost far more."""
    alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return Grammar("lark", f"start: CHOICE\nCHOICE: {alternatives}")


def json_grammar(schema: dict[str, Any]) -> Grammar:
    """JSON that a schema describes. Raises ValueError for what is no JSON."""
    return Grammar("json_schema", _schema_text(schema))


def grammar_of(
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
    structured_outputs: StructuredOutputs | None,
) -> tuple[Grammar, str] | None:
    """What a body's fields ask for, unchecked, and the field's path for errors; None for free text. To be given to
    GrammarChecker.checked."""
    asked = None if isinstance(response_format, TextFormat) else response_format
    if structured_outputs is not None:
        return structured_outputs.wanted, structured_outputs.field
    if isinstance(asked, JsonSchemaFormat):
        schema = asked.json_schema.schema_
        grammar = ANY_OBJECT if schema is None else Grammar("json_schema", schema)
        return grammar, "response_format.json_schema.schema"
    return None if asked is None else (ANY_OBJECT, "response_format")
