"""Who may call what. Keys are compared in constant time, in a dependency of the route and nowhere else."""

from __future__ import annotations

import hmac
import re
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from onebase.serve.api.errors import ApiError, error_response
from onebase.serve.api.state import server_of
from onebase.serve.config import Settings, is_loopback
from onebase.serve.tenants import NOBODY, Keyring, Tenant

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]*)?", re.IGNORECASE)
_OTHER_HOST = ApiError(
    403,
    "The Host header must be localhost, 127.0.0.1 or [::1]: the server has no API key and is for its own machine. "
    "Behind a proxy, set --api-key (or --keys) and --admin-key.",
    code="host_not_allowed",
)


class LocalHostOnly:
    """Around every path of a server that is open to its own machine alone: the Host must be a name of that machine.

    A web page can make its own name resolve to 127.0.0.1, and is then of the same origin as what it asks. But its
    name stands in the Host header. An API key guards against that as well, and --insecure turns the check off.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        has_keys = settings.api_key is not None or settings.keys is not None
        self._any_host = has_keys or settings.insecure or not is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._any_host or _is_local(Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
        else:
            await error_response(_OTHER_HOST)(scope, receive, send)


def require_api_key(request: Request) -> None:
    """Inference routes: the API key, a tenant's key, or the admin key, which may do all that they may. Open where
    neither an API key nor tenants are set. ``request.state.tenant`` is whose the request is."""
    server = server_of(request)
    settings, request.state.tenant = server.settings, NOBODY
    if settings.api_key is None and not server.keyring:
        return
    tenant = _tenant(request, server.keyring)
    if not _presents(request, settings.api_key, settings.admin_key) and tenant is None:
        raise _unauthorized()
    request.state.tenant = tenant or NOBODY


def require_admin_key(request: Request) -> None:
    """Adapter routes: the admin key, or the API key where there is no admin key. Open where neither is set."""
    settings = server_of(request).settings
    wanted = settings.admin_key or settings.api_key
    if wanted is None:
        return _same_origin(request)
    if _presents(request, wanted):
        return None
    if _presents(request, settings.api_key) or _tenant(request, server_of(request).keyring) is not None:
        raise ApiError(403, "This needs the admin key, not the API key.", code="admin_key_required")
    raise _unauthorized()


def caller(request: Request) -> str:
    """Who a request to an adapter route is from, by the key it was let in with. Kept with what it made."""
    settings = server_of(request).settings
    if settings.admin_key is not None:
        return "admin"
    return "anonymous" if settings.api_key is None else "api"


def _is_local(host: str) -> bool:
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].lower())


def _presents(request: Request, *keys: SecretStr | None) -> bool:
    given = _bearer(request)
    matches = [hmac.compare_digest(given, key.get_secret_value().encode()) for key in keys if key is not None]
    return any(matches)


def _tenant(request: Request, keyring: Keyring) -> Tenant | None:
    return keyring.owner(_bearer(request)) if keyring else None


def _bearer(request: Request) -> bytes:
    """The key that a request presents; empty, which is no key, where it presents none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _same_origin(request: Request) -> None:
    """Without keys, a web page must not change the adapters of a server on its reader's own machine.

    Browsers send multipart and empty POSTs to other origins without asking first, but they name their origin.
    """
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, "Web pages of another origin may not change adapters.", code="cross_origin")


def _unauthorized() -> ApiError:
    return ApiError(401, "Missing or wrong key: send Authorization: Bearer KEY.", code="invalid_api_key")
