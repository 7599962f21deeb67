"""POST /v1/embeddings: the hidden states of texts, each as one vector, under an adapter."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from starlette.responses import Response

from onebase.adapters.errors import EngineError
from onebase.serve.api import pooled
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.completions import encoded
from onebase.serve.api.errors import bad_request
from onebase.serve.api.generation import Usage
from onebase.serve.api.pooled import check_inputs, outputs_of
from onebase.serve.api.pooling_schemas import EmbeddingRequest
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.resolve import Target, resolve
from onebase.serve.api.state import Server, admission_of, server_of
from onebase.serve.api.stream import encode_json, until_disconnect
from onebase.serve.api.tenancy import owned
from onebase.serve.api.writing import written
from onebase.serve.engine.messages import Request as EngineRequest
from onebase.serve.engine.messages import SamplingParams

Vector = NDArray[np.float32]

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


@router.post("/v1/embeddings", openapi_extra=json_body(EmbeddingRequest))
async def embeddings(request: Request) -> Response:
    """A vector for a text, or for each of several."""
    body = await read_json(request, EmbeddingRequest)
    server = server_of(request)
    loaded = server.require_ready()
    admission_of(request).sequences.take(len(body.prompts), request.state.held, "input")
    target = await resolve(request, loaded, body.model, body.adapters)
    prompts = await encoded(loaded, target.codec, body.prompts, body.add_special_tokens, "input")
    check_inputs(prompts, loaded)
    usage = request.state.usage = Usage(sum(map(len, prompts)))
    admission_of(request).tokens.take(usage.prompt_tokens, request.state.held, "input")
    vectors = await until_disconnect(request.receive, _run(server, target, body, prompts, usage))
    server.metrics.classified(target.metric, time.monotonic() - request.state.started, usage.prompt_tokens)
    answer = {"object": "list", "model": target.label, "usage": usage.as_dict()}

    def write() -> bytes:
        data = [_item(at, vector, as_text=body.encoding_format == "base64") for at, vector in enumerate(vectors)]
        return encode_json(answer | {"data": data})

    data = await written(server, sum(map(len, vectors)), write)
    return Response(data, media_type="application/json", headers={"x-onebase-adapters": target.exact})


async def _run(
    server: Server, target: Target, body: EmbeddingRequest, prompts: Sequence[Sequence[int]], usage: Usage
) -> list[Vector]:
    """All prompts at once. Raises ApiError 400 where the answer would be too long, or a vector too short."""
    requests = [
        owned(
            EngineRequest(
                uuid.uuid4().hex, tuple(prompt), SamplingParams(0), target.uses, embeds=body.pooling or "last"
            ),
            target.tenant,
        )
        for prompt in prompts
    ]
    found: dict[int, Vector] = {}
    async with aclosing(outputs_of(server, requests)) as outputs:
        async for index, output in outputs:
            usage.cached_tokens += output.cached_tokens
            if output.embedding is None:
                raise EngineError("The engine ended the sequence without its embedding.")
            found[index] = shaped(np.frombuffer(output.embedding, np.float32), body)
            _check_length(len(found[index]) * len(prompts), body)
    return [found[index] for index in range(len(prompts))]


def shaped(vector: Vector, body: EmbeddingRequest) -> Vector:
    """Cut to the dimensions asked for, then of length 1 unless the body says otherwise; a vector of zeros stays one."""
    if body.dimensions is not None and body.dimensions > len(vector):
        message = f"dimensions: {body.dimensions} of a model that has {len(vector)}."
        raise bad_request(message, "dimensions")
    cut = vector[: body.dimensions].astype(np.float64)
    if body.normalize is not False:
        cut /= max(float(np.linalg.norm(cut)), np.finfo(np.float64).tiny)
    return cut.astype(np.float32)


def _check_length(num_values: int, body: EmbeddingRequest) -> None:
    """base64 takes a quarter of the room of decimal numbers."""
    most = pooled.MAX_VALUES * (4 if body.encoding_format == "base64" else 1)
    if num_values > most:
        raise bad_request(f"The answer would have {num_values} values, over {most}: send fewer inputs.", "input")


def _item(index: int, vector: Vector, *, as_text: bool) -> dict[str, Any]:
    """base64 is of little-endian float32, as OpenAI has it."""
    told = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": told}
