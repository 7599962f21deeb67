"""Text to tokens and back: one tokenizer and its chat template, off the event loop where the text is long."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from onebase.adapters.errors import ModelRejected
from onebase.serve.api.conversation import Conversation
from onebase.serve.api.errors import ApiError, bad_request
from onebase.serve.api.rendering import Renderer
from onebase.serve.api.templates import ChatTemplate
from onebase.serve.api.token_texts import TokenTexts

LONG_TEXT = 2000  # characters; shorter texts are encoded faster than a thread is woken
MANY_TEXTS = 16
ENCODERS = 2


@dataclass(frozen=True, slots=True)
class Workers:
    """What codecs share: threads that encode, and the process that renders templates."""

    encoders: ThreadPoolExecutor
    renderer: Renderer

    @classmethod
    def start(cls) -> Workers:
        return cls(ThreadPoolExecutor(ENCODERS, thread_name_prefix="tokenise"), Renderer())

    def close(self) -> None:
        self.encoders.shutdown(wait=False, cancel_futures=True)
        self.renderer.close()


class TextCodec:
    """Encoding never truncates or pads, so that the Rust tokenizer is safe to share."""

    def __init__(
        self,
        backend: Tokenizer,
        template: ChatTemplate | None,
        specials: Mapping[str, str],
        workers: Workers,
        kind: str = "PreTrainedTokenizerFast",
        stops: tuple[int, ...] = (),
    ) -> None:
        """specials: special tokens by their names in transformers (``eos_token``). kind: for /tokenizer_info. stops:
        tokens that end answers, besides the base's own."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.template = template
        self.specials = specials
        self.stops = stops
        self.texts = TokenTexts(backend)
        self._workers = workers
        self._kind = kind

    @classmethod
    def of_model(
        cls, model: str, workers: Workers, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> TextCodec:
        """The base's. Blocking. Raises ModelRejected for a model without a fast tokenizer."""
        from transformers import AutoTokenizer

        hf: Any = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        backend = getattr(hf, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelRejected(f"{model} has no fast tokenizer (tokenizer.json), which streaming needs.")
        specials = {key: str(value) for key, value in hf.special_tokens_map.items() if isinstance(value, str)}
        try:
            template = ChatTemplate.of(hf.chat_template, specials)
        except ValueError as error:
            raise ModelRejected(f"{model}: {error}.") from error
        return cls(backend, template, specials, workers, type(hf).__name__)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    async def encode(
        self, texts: Sequence[str], *, special: bool, max_chars: int, param: str = "prompt"
    ) -> list[list[int]]:
        """Token ids of each. A text over ``max_chars`` is refused before it is tokenised: ApiError 400 on ``param``."""
        _check_length(max(map(len, texts), default=0), max_chars, param)
        if sum(map(len, texts)) <= LONG_TEXT and len(texts) <= MANY_TEXTS:
            return self._encode(texts, special)
        loop = asyncio.get_running_loop()  # one text at a time: requests with many take turns with the others
        encoders = self._workers.encoders
        return [await loop.run_in_executor(encoders, self._encode_long, text, special) for text in texts]

    async def encode_chat(self, conversation: Conversation, *, max_chars: int) -> list[int]:
        """The template's text as token ids. See ``encode``. Raises ApiError 400 where the template refuses it."""
        template = self.require_template()
        if await self._exceeds(conversation, max_chars):
            raise _too_long("messages", f"over {max_chars}", max_chars)
        text = await template.render(self._workers.renderer, conversation, max_chars)
        (tokens,) = await self.encode([text], special=conversation.special, max_chars=max_chars, param="messages")
        return tokens

    async def _exceeds(self, conversation: Conversation, max_chars: int) -> bool:
        if conversation.is_plain:
            return conversation.exceeds(max_chars)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers.encoders, conversation.exceeds, max_chars)

    def require_template(self) -> ChatTemplate:
        """Raises ApiError 400."""
        if self.template is None:
            raise bad_request("The model has no chat template: use /v1/completions.", "messages", "no_chat_template")
        return self.template

    def token_ids(self, texts: Collection[str]) -> dict[str, int]:
        """Those of the texts that are tokens by themselves."""
        found = {text: self.backend.token_to_id(text) for text in texts}
        return {text: token for text, token in found.items() if token is not None}

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens are written out. Lets go of the interpreter, see ``_encode_long``."""
        (text,) = self.backend.decode_batch([list(tokens)], skip_special_tokens=False)
        return str(text)

    async def decode_any(self, tokens: Sequence[int]) -> str:
        """The same, of many tokens in a thread."""
        if len(tokens) <= LONG_TEXT:
            return self.decode(tokens)
        return await asyncio.get_running_loop().run_in_executor(self._workers.encoders, self.decode, tokens)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return [self.backend.id_to_token(token) or "" for token in tokens]

    def describe(self) -> dict[str, Any]:
        """What /tokenizer_info says. Evaluation harnesses read the special tokens and the template."""
        named = {name: self.specials.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {
            "tokenizer_class": self._kind,
            "vocab_size": self.vocab_size,
            "chat_template": None if self.template is None else self.template.text,
            **named,
            **self.specials,
        }

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [list(self.backend.encode(text, add_special_tokens=special).ids) for text in texts]

    def _encode_long(self, text: str, special: bool) -> list[int]:
        """The same for one text. Of tokenizers' methods only those of batches let go of the interpreter."""
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=special)
        return list(encoding.ids)


def _check_length(characters: int, allowed: int, param: str) -> None:
    if characters > allowed:
        raise _too_long(param, str(characters), allowed)


def _too_long(param: str, characters: str, allowed: int) -> ApiError:
    return bad_request(
        f"{param}: {characters} characters; at most {allowed} are tokenised, far more than the context holds.",
        param,
        "context_length_exceeded",
    )
