"""Tools in a chat request: functions that the model may call, and whether it must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, ValidationError

from onebase.serve.api.chat_messages import FunctionName
from onebase.serve.api.errors import bad_request
from onebase.serve.api.schemas import Body

MAX_TOOLS = 128
MAX_SCHEMA_DEPTH = 32

Description = Annotated[str, Field(max_length=1 << 16)]


class Function(Body):
    """parameters: a JSON schema of an object; without it the function takes none. strict: see docs/http.md."""

    name: FunctionName
    description: Description | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None

    @property
    def json_schema(self) -> dict[str, JsonValue]:
        return self.parameters or {"type": "object", "properties": {}}

    def for_template(self) -> dict[str, Any]:
        described = {"name": self.name, "description": self.description or "", "parameters": self.json_schema}
        return {"type": "function", "function": described}


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: FunctionName


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
_WORDS = ("none", "auto", "required")


def named_by(form: type[Body], shown: str) -> BeforeValidator:
    """Of a tool_choice: one error for all of its forms. form: that of a function's name; shown: for the message."""

    def check(value: Any) -> Any:
        if value in _WORDS or isinstance(value, form):
            return value
        try:
            return form.model_validate(value)
        except ValidationError:
            raise ValueError(f"allowed are 'none', 'auto', 'required', and {shown} with a tool's name") from None

    return BeforeValidator(check)


Named = named_by(NamedChoice, '{"type": "function", "function": {"name": ...}}')
ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedChoice, Named]


def check_tools(functions: Sequence[Function], path: str) -> None:
    """Raises ApiError 400. path: where a function's fields are, with ``{}`` for its index."""
    seen: set[str] = set()
    for index, function in enumerate(functions):
        field = path.format(index)
        if function.name in seen:
            raise bad_request(f"{field}.name: two functions have the name {function.name!r}.", f"{field}.name")
        seen.add(function.name)
        parameters = function.parameters
        if parameters is not None and parameters.get("type", "object") != "object":
            raise bad_request(f"{field}.parameters: the schema must be of type object.", f"{field}.parameters")
        if _depth(parameters) > MAX_SCHEMA_DEPTH:
            raise bad_request(
                f"{field}.parameters: it nests deeper than {MAX_SCHEMA_DEPTH} levels.", f"{field}.parameters"
            )


def check_choice(name: str | None, functions: Sequence[Function], wanted: bool, param: str) -> None:
    """name: of the function that is asked for; wanted: whether there may be calls at all. Raises ApiError 400."""
    if wanted and not functions:
        raise bad_request("tool_choice is only allowed where there are tools.", param)
    if name is not None and name not in {function.name for function in functions}:
        raise bad_request(f"tool_choice: {name!r} is none of the tools: {_some(functions)}.", param)


def _some(functions: Sequence[Function], most: int = 10) -> str:
    """Their names, of many only the first."""
    names = [function.name for function in functions]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _depth(value: JsonValue) -> int:
    """Of nesting, level by level, so that a hostile one costs no stack."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth
