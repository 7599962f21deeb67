"""Fifty JSON schemas of the kinds that people write; every answer to them ends within a few hundred tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

WORD: Schema = {"type": "string", "maxLength": 12}


def _object(**members: Any) -> Schema:
    return {"type": "object", "properties": members, "required": [*members], "additionalProperties": False}


def _array(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _numbers() -> Iterator[Schema]:
    for low, high in ((0, 9), (-5, 5), (17, 1234), (-1000, -900), (1, 1)):
        yield _object(n={"type": "integer", "minimum": low, "maximum": high})
    for low, high in ((0, 1), (-2.5, 2.5), (99.5, 100.25)):
        yield _object(x={"type": "number", "minimum": low, "maximum": high, "multipleOf": 0.25})
    yield _object(x={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 3, "multipleOf": 0.125})
    yield _object(n={"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700})


def _texts() -> Iterator[Schema]:
    yield _object(a=WORD, b={"type": "string", "minLength": 3, "maxLength": 5})
    for pattern in (r"^[a-z]{2,6}$", r"^\+?[0-9]{3,8}$", r"^(red|green)-[0-9]+x?$", r"^[A-Z][a-zäöüß]{1,5}$"):
        yield _object(p={"type": "string", "pattern": pattern, "maxLength": 20})
    for known in ("date", "uuid", "ipv4", "ipv6"):
        yield _object(f={"type": "string", "format": known})
    yield {"type": "string", "maxLength": 16}


def _enums() -> Iterator[Schema]:
    yield _object(kind={"enum": ["cat", "dog", "öwl", "🦊", "魚", "كلب"]})
    yield _object(kind={"enum": [1, "1", None, True, 1.5, [1], {"a": 1}]})
    yield _object(kind={"const": 'quote " and \\ and \n'})
    yield {"enum": [f"value {at}" for at in range(500)]}
    yield _object(**{"schlüssel": {"type": "boolean"}, "鍵": {"type": "null"}, "🔑": {"type": "integer", "maximum": 9}})


def _unions() -> Iterator[Schema]:
    yield _object(v={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, WORD, {"type": "null"}]})
    yield _object(v={"type": ["boolean", "null"]})
    yield {"anyOf": [_object(cat=WORD), _object(dog={"type": "boolean"})]}
    yield {"oneOf": [_object(kind={"const": "a"}, x=WORD), _object(kind={"const": "b"}, y={"type": "boolean"})]}
    yield {"allOf": [_object(a=WORD), {"type": "object", "properties": {"a": {"minLength": 2}}}]}


def _arrays() -> Iterator[Schema]:
    yield _array({"type": "boolean"}, 2, 4)
    yield _array(_object(id={"type": "integer", "minimum": 0, "maximum": 9}), 0, 3)
    yield _array(_array({"type": "null"}, 1, 2), 1, 3)
    yield {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2}
    yield _object(tags=_array({"enum": ["a", "b"]}, 0, 2), more=_array(WORD, 1, 1))


def _nested() -> Iterator[Schema]:
    inner = _object(leaf={"type": "boolean"})
    for depth in range(2, 8):
        inner = _object(**{f"level{depth}": inner})
        yield inner
    optional = {"type": "object", "properties": {"a": WORD, "b": {"type": "null"}}, "additionalProperties": False}
    yield optional
    yield _object(person=_object(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 130}), notes=optional)


def _references() -> Iterator[Schema]:
    tree = _object(
        value={"type": "integer", "minimum": 0, "maximum": 9}, children=_array({"$ref": "#/$defs/leaf"}, 0, 2)
    )
    leaf = _object(value={"type": "boolean"})
    yield {"$ref": "#/$defs/tree", "$defs": {"tree": tree, "leaf": leaf}}
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["next"],
        "additionalProperties": False,
    }
    yield {"$ref": "#/$defs/node", "$defs": {"node": node}}
    deep = {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"$ref": "#/$defs/deep"}, "maxItems": 1}]}
    yield _object(deep={"$ref": "#/$defs/deep"}) | {"$defs": {"deep": deep}}
    yield _object(a={"$ref": "#/definitions/word"}, b={"$ref": "#/definitions/word"}) | {"definitions": {"word": WORD}}
    yield _object(home={"$ref": "#/$defs/place"}) | {
        "$defs": {"place": _object(city=WORD, zip={"pattern": "^[0-9]{5}$", "type": "string"})}
    }
    yield _object(either={"anyOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}]}) | {
        "$defs": {"x": WORD, "y": {"type": "boolean"}}
    }
    yield {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    }


SCHEMAS: tuple[Schema, ...] = (
    *_numbers(), *_texts(), *_enums(), *_unions(), *_arrays(), *_nested(), *_references()
)  # fmt: skip
