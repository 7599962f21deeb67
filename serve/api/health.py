"""GET /health, /ready, /version and /metrics: open to all, and answered whatever the engine does."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from onebase.serve.api.state import VERSION, server_of

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The server is alive; whether it can serve is /ready."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    server_of(request).require_ready()
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": VERSION}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    text, kind = server_of(request).metrics.render()
    return Response(text, media_type=kind)
