"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.errors import bad_request
from onebase.serve.api.query import query_parameters, read_query, refuse_unread
from onebase.serve.api.resolve import held
from onebase.serve.api.state import Loaded, server_of
from onebase.serve.api.stream import encode_json, until_disconnect
from onebase.serve.api.tokenize_schemas import DetokenizeRequest, TokenizeRequest, TokenizerQuery
from onebase.serve.api.tokenizer import TextCodec
from onebase.serve.api.writing import written

COUNTED_CHARS = 1 << 20  # texts up to this length can be counted, however short the context

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Ids of a text (special tokens added) or of messages through the chat template (none added)."""
    body = await read_json(request, TokenizeRequest)
    loaded, codec = await _named(request, body.model)
    tokens = await until_disconnect(request.receive, _tokens(loaded, codec, body))

    def write() -> bytes:
        texts = codec.token_texts(tokens) if body.return_token_strs else None
        sizes = {"count": len(tokens), "max_model_len": loaded.info.max_model_len}
        return encode_json({**sizes, "tokens": tokens, "token_strs": texts})

    return Response(await written(server_of(request), len(tokens), write), media_type="application/json")


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of ids, special tokens written out."""
    body = await read_json(request, DetokenizeRequest)
    _, codec = await _named(request, body.model)
    worst = max(body.tokens, default=0)
    if worst >= codec.vocab_size:
        raise bad_request(f"tokens: {worst} is no token; ids are 0 to {codec.vocab_size - 1}.", "tokens")
    return Response(encode_json({"prompt": await codec.decode_any(body.tokens)}), media_type="application/json")


@router.get("/tokenizer_info", openapi_extra=query_parameters(TokenizerQuery))
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """Special tokens and chat template of the tokenizer that a model is served with."""
    _, codec = await _named(request, read_query(request, TokenizerQuery).model)
    return codec.describe()


async def _named(request: Request, model: str | None) -> tuple[Loaded, TextCodec]:
    """With the tokenizer and template of the model named; without a name they are the base's."""
    server = server_of(request)
    loaded = server.require_loaded()
    if model is None or model == server.settings.base_name:
        return loaded, loaded.codec
    entry = await held(loaded, model, "model", request.state.held)
    return loaded, await loaded.codecs.of(entry.digest, entry.path)


async def _tokens(loaded: Loaded, codec: TextCodec, body: TokenizeRequest) -> list[int]:
    max_chars = max(loaded.max_chars, COUNTED_CHARS)
    if body.messages is None:
        special = body.add_special_tokens is not False
        (tokens,) = await codec.encode([body.prompt or ""], special=special, max_chars=max_chars)
        return tokens
    return await codec.encode_chat(body.conversation, max_chars=max_chars)
