"""How one request uses tools: what the model is told of them, what it may write, and how its answers are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from onebase.serve.api.conversation import Conversation
from onebase.serve.api.tool_schemas import Function
from onebase.serve.api.tools.grammars import CallGrammars
from onebase.serve.api.tools.parser import ToolParser
from onebase.serve.api.tools.reader import ToolReader
from onebase.serve.api.tools.syntax import Syntax
from onebase.serve.engine.messages import Grammar


@dataclass(frozen=True, slots=True)
class ToolUse:
    """functions: that the model is told of. named: the only one that may be called. forced: one has to be. parallel:
    more than one call is wanted. tokens: markers of the syntax that are tokens of the vocabulary, with their ids.
    """

    syntax: Syntax
    functions: tuple[Function, ...]
    named: str | None = None
    forced: bool = False
    parallel: bool = True
    tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def callable(self) -> tuple[Function, ...]:
        return tuple(function for function in self.functions if self.named in (None, function.name))

    def grammar(self, schema: str | None) -> Grammar | None:
        """None where the model writes what it likes. schema: of the answer, where it calls no tool; as JSON."""
        many = self.parallel and self.named is None
        grammars = CallGrammars(self.syntax, self.callable, self.tokens, many=many)
        if self.forced:
            return grammars.forced()
        if schema is not None:
            return grammars.or_json(schema)
        return grammars.free() if any(function.strict for function in self.functions) else None

    def told(self, conversation: Conversation) -> Conversation:
        """What the template gets. A call that is forced is opened by the prompt."""
        tools = [function.for_template() for function in self.functions]
        return replace(conversation, tools=tools, tail=self.syntax.tail if self.forced else "")

    def reader(self) -> ToolReader:
        """Of one choice."""
        names = [function.name for function in self.callable]
        most = None if self.parallel and self.named is None else 1
        return ToolReader(ToolParser(self.syntax, names, most=most, opened=self.forced))
