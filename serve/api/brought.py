"""What an adapter's folder brings of a tokenizer and a chat template, read as a stranger's files."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from onebase.adapters.check import TOKENIZER_FILES
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.strict_json import JsonError, parse_strict
from onebase.serve.api.rendering import TemplateFailed
from onebase.serve.api.templates import ChatTemplate
from onebase.serve.api.tokenizer import TextCodec, Workers

_TOKENIZER, _CONFIG, _SPECIALS, _TEMPLATE = TOKENIZER_FILES
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Brought:
    """template: as tokenizers have it; None: the base's. specials: special tokens, by name; None where it has none.
    tokenizer: its file, if there is one."""

    template: str | Mapping[str, str] | None
    specials: Mapping[str, str | None]
    tokenizer: Path | None

    @property
    def is_nothing(self) -> bool:
        return self.template is None and not self.specials and self.tokenizer is None


def read_brought(folder: Path) -> Brought:
    """Blocking. Raises AdapterRejected that names the file."""
    config = _read_json(folder / _CONFIG)
    specials = _special_tokens(config, _CONFIG) | _special_tokens(_read_json(folder / _SPECIALS), _SPECIALS)
    own = folder / _TOKENIZER
    return Brought(_template(folder, config), specials, own if own.is_file() else None)


async def codec_of(brought: Brought, base: TextCodec, base_file: Path, vocab_size: int, workers: Workers) -> TextCodec:
    """The codec of an adapter; the base's own where nothing differs. base_file: the base's tokenizer.json; vocab_size:
    of the base's embedding. Raises AdapterRejected."""
    backend = base.backend
    if brought.tokenizer is not None and await _differs(brought.tokenizer, base_file, vocab_size):
        loop = asyncio.get_running_loop()
        backend = await loop.run_in_executor(workers.encoders, Tokenizer.from_file, str(brought.tokenizer))
    merged = {**base.specials, **brought.specials}
    specials = {name: text for name, text in merged.items() if text is not None}
    template = await _checked(brought, base, specials, workers)
    if backend is base.backend and specials == base.specials and template == base.template:
        return base
    return TextCodec(backend, template, specials, workers, stops=_stops(brought, backend))


async def _checked(
    brought: Brought, base: TextCodec, specials: Mapping[str, str], workers: Workers
) -> ChatTemplate | None:
    given = brought.template
    if given is None:
        return None if base.template is None else ChatTemplate(base.template.text, specials, base.template.tool_text)
    try:
        template = ChatTemplate.of(given, specials)
        for text in [given] if isinstance(given, str) else given.values():
            await workers.renderer.check(text)
    except (TemplateFailed, ValueError) as error:
        raise AdapterRejected(f"The chat template is refused: {error}.", param=_TEMPLATE) from error
    return template


async def _differs(own: Path, base: Path, vocab_size: int) -> bool:
    told = await _compared(own, base)
    if told["refused"]:
        raise AdapterRejected(
            f"{_TOKENIZER} is refused: {told['refused']}. Leave it out to be served with the base's tokenizer.",
            param=_TOKENIZER,
        )
    if told["largest"] >= vocab_size:
        raise AdapterRejected(
            f"{_TOKENIZER} has the token {told['largest']}, and the base embeds {vocab_size}: tokens beyond the base's "
            "vocabulary are not served.",
            param=_TOKENIZER,
        )
    return not told["same"]


async def _compared(own: Path, base: Path) -> dict[str, Any]:
    command = [sys.executable, "-I", "-m", "onebase.serve.api.tokenizer_child", str(base), str(own)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, env={"PATH": os.defpath}
    )
    try:
        told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        return {"same": False, "refused": "reading it takes too much time or memory", "largest": 0}
    found: dict[str, Any] = json.loads(told)
    return found


def _stops(brought: Brought, backend: Tokenizer) -> tuple[int, ...]:
    """The adapter was trained to end with its own end token."""
    end = brought.specials.get("eos_token")
    token = None if end is None else backend.token_to_id(end)
    return () if token is None else (token,)


def _template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    file = folder / _TEMPLATE
    if file.is_file():
        return _read_text(file)
    given = config.get("chat_template")
    if given is None or isinstance(given, str):
        return given
    named = {one["name"]: one["template"] for one in given if _is_named(one)} if isinstance(given, list) else {}
    if not named or len(named) < len(given):
        raise AdapterRejected(
            f"{_CONFIG}: chat_template must be a text, or a list of names and templates.", param=_CONFIG
        )
    return named


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "template"))


def _special_tokens(given: Mapping[str, Any], name: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for token in _NAMES:
        if token in given:
            value = given[token]
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str | None):
                raise AdapterRejected(f"{name}: {token} must be a text.", param=name)
            found[token] = text
    return found


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = parse_strict(_read_text(file))
    except JsonError as error:
        raise AdapterRejected(f"{file.name} is refused: {error}.", param=file.name) from None
    if not isinstance(value, dict):
        raise AdapterRejected(f"{file.name} is refused: it is not a JSON object.", param=file.name)
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError:
        raise AdapterRejected(f"{file.name} is refused: it is not UTF-8.", param=file.name) from None
