"""What wraps every request, as plain ASGI so that streams and disconnects pass through untouched: ids, log, counts."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebase.serve.metrics import Metrics

HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET = frozenset({"/health", "/ready", "/metrics"})

log = structlog.get_logger("onebase.http")


class RequestContext:
    """Gives every request an id (the client's, if printable and short), logs it and counts it by route and status.

    The id is for logs and response ids only: engine requests have keys of their own. ``request.state.held`` is what
    the request holds on to (reservations, files); it is let go once the response has ended, however it ended.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope).get(HEADER))
        status, start = 0, time.monotonic()
        held = AsyncExitStack()
        scope.setdefault("state", {}).update(request_id=request_id, started=start, held=held)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            async with held:
                await self._app(scope, receive, sending)
        except Exception:
            scope["state"]["failure"] = "internal_error"  # answered further out
            raise
        finally:
            self._record(scope, status or 499, request_id, time.monotonic() - start)

    def _record(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.http_request(route, status)
        state = scope["state"]
        self._record_failure(state)
        tenant = state["tenant"].name if "tenant" in state else ""
        if "usage" in state:
            self._metrics.tenants.used(tenant, state["usage"])
        if route not in _QUIET:
            whose = {"tenant": tenant} if tenant else {}
            log.info(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                id=request_id,
                s=round(seconds, 3),
                **whose,
            )

    def _record_failure(self, state: Mapping[str, Any]) -> None:
        """``model`` is what answers, once that is known; ``failure`` the code of the error that the client was told."""
        if "model" in state and "failure" in state:
            self._metrics.models.failed(state["model"], state["failure"])


class HeadAsGet:
    """HEAD is answered wherever GET is: with the same status and headers, and no body (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, without_body)


def request_id_of(given: str | None) -> str:
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
