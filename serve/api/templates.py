"""A model's chat template, and what a conversation becomes in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onebase.serve.api.conversation import Conversation
from onebase.serve.api.errors import bad_request
from onebase.serve.api.rendering import Renderer, TemplateFailed
from onebase.serve.api.tools.fallback import in_words
from onebase.serve.api.tools.syntax import HERMES, Syntax, syntax_of


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """text: Jinja, as transformers has it. tool_text: instead of it where a request has tools. specials: the
    tokenizer's special tokens as the template's variables (``bos_token``)."""

    text: str
    specials: Mapping[str, str]
    tool_text: str | None = None

    @classmethod
    def of(cls, given: str | Mapping[str, str] | None, specials: Mapping[str, str]) -> ChatTemplate | None:
        """given: as tokenizers have it, one template or several by name. Raises ValueError without a default."""
        if given is None:
            return None
        if isinstance(given, str):
            return cls(given, specials)
        if "default" not in given:
            raise ValueError(f"of several chat templates one must be named default; there are {sorted(given)}")
        return cls(given["default"], specials, given.get("tool_use"))

    @property
    def native_syntax(self) -> Syntax | None:
        """Of the calls that the template shows. See ``syntax_of``."""
        return syntax_of(self.tool_text or self.text)

    @property
    def syntax(self) -> Syntax:
        """Of the calls that the model is expected to write."""
        return self.native_syntax or HERMES

    async def render(self, renderer: Renderer, conversation: Conversation, max_chars: int) -> str:
        """The prompt. A template that knows no tools gets them in words. Raises ApiError 400."""
        if self.native_syntax is None:
            conversation = in_words(conversation)
        text = self.tool_text if self.tool_text is not None and conversation.tools else self.text
        try:
            rendered = await renderer.render(text, conversation.context(self.specials), max_chars)
        except TemplateFailed as error:
            raise refusal(error) from error
        return conversation.finish(rendered)


def refusal(error: TemplateFailed) -> Exception:
    """ApiError 400: whatever a template says is about the messages."""
    return bad_request(f"The chat template refuses the messages: {error}.", "messages", "chat_template")
