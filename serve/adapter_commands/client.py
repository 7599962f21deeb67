"""The adapter routes as a client calls them. Answers are the server's JSON, errors its messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import httpx

if TYPE_CHECKING:
    from onebase.serve.adapter_commands.form import AdapterForm

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
PAGE = 1000
KEY_HINT = " (ONEBASE_ADMIN_KEY has the key: the server's admin key, or its API key where it has no admin key)"

Json = dict[str, Any]


class CallFailed(Exception):
    """The server refused, or could not be reached. The message is for people."""


class AdapterClient:
    """One connection to one server. Every call raises CallFailed for an answer that is not 2xx."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def cards(self, filters: Mapping[str, Any], limit: int | None) -> Iterator[Json]:
        """Every adapter that passes the filters, by name, as many pages as it takes and at most ``limit``."""
        after, left = None, limit
        while left is None or left > 0:
            params = {**filters, "limit": PAGE if left is None else min(PAGE, left)}
            page = self._call("GET", "/v1/adapters", params=params if after is None else {**params, "after": after})
            yield from page["data"]
            if not page["has_more"]:
                return
            after, left = page["next"], None if left is None else left - len(page["data"])

    def card(self, reference: str) -> Json:
        return self._call("GET", _path(reference))

    def versions(self, name: str) -> list[Json]:
        """All, oldest first, as many pages as it takes."""
        found: list[Json] = []
        params = {"limit": PAGE}
        while True:
            page = self._call("GET", _path(name, "versions"), params=params)
            found += page["data"]
            if not page["has_more"]:
                return found
            params["after"] = page["next"]

    def upload(self, form: AdapterForm) -> Json:
        """Waits until the adapter is checked, compiled, resident and durable."""
        headers = {"Content-Type": form.content_type, "Content-Length": str(form.nbytes)}
        return self._call("POST", "/v1/adapters", patient=True, content=form.chunks(), headers=headers)

    def fetch(self, name: str, source: str, revision: str | None, *, wait: bool) -> Json:
        """Asks the server to get the files itself."""
        body = {"name": name, "source": source} | ({} if revision is None else {"revision": revision})
        return self._call("POST", "/v1/adapters", patient=wait, json=body, params={"wait": _flag(wait)})

    def change(self, name: str, **fields: Any) -> Json:
        """PATCH: pinned, labels or aliases."""
        return self._call("PATCH", _path(name), json=fields)

    def rollback(self, name: str, version: int | None) -> Json:
        body = None if version is None else {"version": version}
        return self._call("POST", _path(name, "rollback"), patient=True, json=body)

    def load(self, reference: str) -> Json:
        return self._call("POST", _path(reference, "load"), patient=True)

    def unload(self, reference: str, *, force: bool, wait: bool) -> Json:
        params = {"force": _flag(force), "wait": _flag(wait)}
        return self._call("POST", _path(reference, "unload"), patient=wait, params=params)

    def delete(self, name: str, *, force: bool) -> Json:
        """With force the answer comes after the requests that it ends, else at once."""
        return self._call("DELETE", _path(name), patient=force, params={"force": _flag(force)})

    def collect(self, keep: int | None, *, dry_run: bool) -> Json:
        return self._call("POST", "/v1/registry/gc", patient=True, json={"keep": keep, "dry_run": dry_run})

    def _call(self, method: str, path: str, *, patient: bool = False, **options: Any) -> Json:
        """patient: waits for the answer as long as it takes."""
        if patient:
            options["timeout"] = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS, read=None)
        with _said_plainly(self._http.base_url):
            response = self._http.request(method, path, **options)
        if not response.is_success:
            raise CallFailed(_reason(response))
        return _answer(response)


@contextmanager
def _said_plainly(url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as error:
        raise CallFailed(f"no server answers at {url} ({error}); --url or ONEBASE_URL names another") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CallFailed(f"{url}: {error or type(error).__name__}") from error


def _answer(response: httpx.Response) -> Json:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CallFailed(
            f"{response.url} answered, but not as a OneBase server does; --url or ONEBASE_URL names another"
        )
    return found


def _reason(response: httpx.Response) -> str:
    """The message of the server's error envelope; what is known where something else answered."""
    hint = KEY_HINT if response.status_code == httpx.codes.UNAUTHORIZED else ""
    try:
        return str(response.json()["error"]["message"]) + hint
    except (ValueError, LookupError, TypeError):
        return f"{response.url} answered {response.status_code} {response.reason_phrase}{hint}"


def _path(reference: str, *rest: str) -> str:
    """Raises CallFailed for what the server would take for another route."""
    if not reference or "/" in reference:
        raise CallFailed(f"{reference!r} is not an adapter name")
    return "/".join(("/v1/adapters", quote(reference, safe="@:"), *rest))


def _flag(value: bool) -> str:
    return "true" if value else "false"
