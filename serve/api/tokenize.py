"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.errors import bad_request
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.resolve import find_model
from onebase.serve.api.state import Loaded, server_of
from onebase.serve.api.stream import encode_json
from onebase.serve.api.tokenize_schemas import DetokenizeRequest, TokenizeRequest
from onebase.serve.api.writing import written

COUNTED_CHARS = 1 << 20  # texts up to this length can be counted, however short the context

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Ids of a text (special tokens added) or of messages through the chat template (none added)."""
    body = await read_json(request, TokenizeRequest)
    loaded = await _loaded(request, body.model)
    tokens = await _tokens(loaded, body)

    def write() -> bytes:
        texts = loaded.codec.token_texts(tokens) if body.return_token_strs else None
        sizes = {"count": len(tokens), "max_model_len": loaded.info.max_model_len}
        return encode_json({**sizes, "tokens": tokens, "token_strs": texts})

    return Response(await written(server_of(request), len(tokens), write), media_type="application/json")


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of ids, special tokens written out."""
    body = await read_json(request, DetokenizeRequest)
    loaded = await _loaded(request, body.model)
    worst = max(body.tokens, default=0)
    if worst >= loaded.codec.vocab_size:
        raise bad_request(f"tokens: {worst} is no token; ids are 0 to {loaded.codec.vocab_size - 1}.", "tokens")
    return Response(encode_json({"prompt": await loaded.codec.decode_any(body.tokens)}), media_type="application/json")


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    return server_of(request).require_loaded().codec.describe()


async def _loaded(request: Request, model: str | None) -> Loaded:
    """The tokenizer is the base's whatever adapter is named, but the name must exist."""
    server = server_of(request)
    loaded = server.require_loaded()
    if model is not None and model != server.settings.base_name:
        await find_model(loaded.store, model, "model")
    return loaded


async def _tokens(loaded: Loaded, body: TokenizeRequest) -> list[int]:
    max_chars = max(loaded.max_chars, COUNTED_CHARS)
    if body.messages is None:
        special = body.add_special_tokens is not False
        (tokens,) = await loaded.codec.encode([body.prompt or ""], special=special, max_chars=max_chars)
        return tokens
    return await loaded.codec.encode_chat(body.conversation, max_chars=max_chars)
