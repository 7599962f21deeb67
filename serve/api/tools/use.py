"""How one request uses tools: what the model is told of them, and how its answers are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onebase.serve.api.conversation import Conversation
from onebase.serve.api.tool_schemas import Function
from onebase.serve.api.tools.parser import ToolParser
from onebase.serve.api.tools.reader import ToolReader
from onebase.serve.api.tools.syntax import Syntax


@dataclass(frozen=True, slots=True)
class ToolUse:
    """functions: that may be called. parallel: more than one call is wanted."""

    syntax: Syntax
    functions: tuple[Function, ...]
    parallel: bool = True

    def told(self, conversation: Conversation) -> Conversation:
        """What the template gets."""
        return replace(conversation, tools=[function.for_template() for function in self.functions])

    def reader(self) -> ToolReader:
        """Of one choice."""
        names = [function.name for function in self.functions]
        return ToolReader(ToolParser(self.syntax, names, most=None if self.parallel else 1))
