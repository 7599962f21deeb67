"""Text to tokens: the base's tokenizer and chat template, off the event loop where the text is long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tokenizers import Tokenizer

from onebase.adapters.errors import ModelRejected
from onebase.serve.api.errors import bad_request
from onebase.serve.api.token_texts import TokenTexts

LONG_TEXT = 2000  # characters; shorter texts are encoded faster than a thread is woken
MANY_TEXTS = 16
ENCODERS = 2


class TextCodec:
    """The base's tokenizer. Encoding never truncates or pads, so that the Rust tokenizer is safe to share."""

    def __init__(self, model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
        """Blocking. Raises ModelRejected for a model without a fast tokenizer."""
        from transformers import AutoTokenizer

        self._hf: Any = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        backend = getattr(self._hf, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelRejected(f"{model} has no fast tokenizer (tokenizer.json), which streaming needs.")
        self.backend: Tokenizer = backend
        backend.no_truncation()
        backend.no_padding()
        self.texts = TokenTexts(backend)
        self._pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="tokenise")

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
        return [(await loop.run_in_executor(self._pool, self._encode, [text], special))[0] for text in texts]

    async def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, max_chars: int, special: bool = False, open_turn: bool = True
    ) -> list[int]:
        """The template's text as token ids; the template writes the special tokens itself. See ``encode``."""
        if self._hf.chat_template is None:
            raise bad_request(
                "The base model has no chat template: use /v1/completions.", "messages", "no_chat_template"
            )
        _check_length(sum(len(message["content"]) for message in messages), max_chars, "messages")
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._pool, self._render, list(messages), open_turn)
        (tokens,) = await self.encode([text], special=special, max_chars=max_chars, param="messages")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.backend.decode(list(tokens), skip_special_tokens=False))

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        return [self.backend.id_to_token(token) or "" for token in tokens]

    def describe(self) -> dict[str, Any]:
        """What /tokenizer_info says. Evaluation harnesses read the special tokens and the template."""
        special = {key: str(value) for key, value in self._hf.special_tokens_map.items() if isinstance(value, str)}
        return {
            "tokenizer_class": type(self._hf).__name__,
            "vocab_size": self.vocab_size,
            "bos_token": self._hf.bos_token,
            "eos_token": self._hf.eos_token,
            "pad_token": self._hf.pad_token,
            "unk_token": self._hf.unk_token,
            "chat_template": self._hf.chat_template,
            **special,
        }

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [list(self.backend.encode(text, add_special_tokens=special).ids) for text in texts]

    def _render(self, messages: list[Mapping[str, str]], open_turn: bool) -> str:
        try:
            return str(self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn))
        except Exception as error:  # templates raise whatever their expressions raise; all of it is about the messages
            raise bad_request(
                f"The chat template refuses the messages: {error}", "messages", "chat_template"
            ) from error


def _check_length(characters: int, allowed: int, param: str) -> None:
    if characters > allowed:
        raise bad_request(
            f"{param}: {characters} characters; at most {allowed} are tokenised, far more than the context holds.",
            param,
            "context_length_exceeded",
        )
