"""POST /v1/classify, in vLLM's shape: what an adapter's classification head says of texts, or of their tokens."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from starlette.responses import Response

from onebase.serve.api import pooled
from onebase.serve.api.auth import require_api_key
from onebase.serve.api.body import json_body, read_json
from onebase.serve.api.completions import encoded
from onebase.serve.api.errors import bad_request
from onebase.serve.api.generation import Usage
from onebase.serve.api.pooled import check_inputs, outputs_of
from onebase.serve.api.pooling_schemas import ClassifyRequest
from onebase.serve.api.query import refuse_unread
from onebase.serve.api.resolve import Target, resolve
from onebase.serve.api.state import Server, admission_of, server_of
from onebase.serve.api.stream import encode_json, until_disconnect
from onebase.serve.api.tenancy import owned
from onebase.serve.api.writing import written
from onebase.serve.engine.messages import ClassLogits, SamplingParams
from onebase.serve.engine.messages import Request as EngineRequest

router = APIRouter(dependencies=[Depends(require_api_key), Depends(refuse_unread)])


@dataclass(slots=True)
class _Found:
    """What was said of one prompt so far."""

    num_labels: int = 0
    per_token: bool = False
    raw: list[bytes] = field(default_factory=list)

    def add(self, classes: ClassLogits) -> None:
        self.num_labels, self.per_token = classes.num_labels, classes.per_token
        self.raw.append(classes.logits)

    @property
    def num_values(self) -> int:
        return sum(map(len, self.raw)) // 4

    def logits(self) -> NDArray[np.float64]:
        """[tokens, or 1 for the whole prompt; num_labels]"""
        return np.frombuffer(b"".join(self.raw), np.float32).reshape(-1, self.num_labels).astype(np.float64)


@router.post("/v1/classify", openapi_extra=json_body(ClassifyRequest))
async def classify(request: Request) -> Response:
    """Probabilities of the labels of a text, of each of several texts, or of their tokens."""
    body = await read_json(request, ClassifyRequest)
    server = server_of(request)
    loaded = server.require_ready()
    admission_of(request).sequences.take(len(body.prompts), request.state.held, "input")
    target = await resolve(request, loaded, body.model, body.adapters)
    prompts = await encoded(loaded, target.codec, body.prompts, body.add_special_tokens, "input")
    check_inputs(prompts, loaded)
    usage = request.state.usage = Usage(sum(map(len, prompts)))
    admission_of(request).tokens.take(usage.prompt_tokens, request.state.held, "input")
    found = await until_disconnect(request.receive, _run(server, target, prompts, usage))
    server.metrics.classified(target.metric, time.monotonic() - request.state.started, usage.prompt_tokens)
    answer = {
        "id": f"classify-{request.state.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": target.label,
        "usage": usage.as_dict(),
    }
    activated = body.use_activation is not False

    def write() -> bytes:
        return encode_json(answer | {"data": [_item(at, one, activated) for at, one in enumerate(found)]})

    data = await written(server, sum(one.num_values for one in found), write)
    return Response(data, media_type="application/json", headers={"x-onebase-adapters": target.exact})


async def _run(server: Server, target: Target, prompts: Sequence[Sequence[int]], usage: Usage) -> list[_Found]:
    """All prompts at once; the first failure, or the client's leaving, ends them all."""
    found = [_Found() for _ in prompts]
    values = 0
    requests = [
        owned(
            EngineRequest(uuid.uuid4().hex, tuple(prompt), SamplingParams(0), target.uses, classifies=True),
            target.tenant,
        )
        for prompt in prompts
    ]
    async with aclosing(outputs_of(server, requests)) as told:
        async for index, output in told:
            usage.cached_tokens += output.cached_tokens
            if output.classes is not None:
                found[index].add(output.classes)
                values += len(output.classes.logits) // 4
            if values > pooled.MAX_VALUES:
                message = f"The answer would have over {pooled.MAX_VALUES} probabilities: send fewer or shorter inputs."
                raise bad_request(message, "input")
    return found


def _item(index: int, found: _Found, activated: bool) -> dict[str, Any]:
    logits = found.logits()
    values = (activation(logits) if activated else logits).tolist()
    best = logits.argmax(axis=1).tolist()
    rows = [
        {"index": at, "label": f"LABEL_{label}", "probs": probs, "num_classes": found.num_labels}
        for at, (label, probs) in enumerate(zip(best, values, strict=True))
    ]
    return (
        {"index": index, "num_classes": found.num_labels, "tokens": rows}
        if found.per_token
        else rows[0] | {"index": index}
    )


def activation(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of logits [rows, labels]: a softmax, or the sigmoid of a single label."""
    if logits.shape[1] == 1:
        raised = np.exp(-np.abs(logits))
        return np.where(logits >= 0, 1 / (1 + raised), raised / (1 + raised))
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))
