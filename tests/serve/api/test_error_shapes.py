"""Every error has OpenAI's shape, whatever refuses: router, method, reader of the body, a missing model."""

from __future__ import annotations

from typing import Any

import pytest

CASES: list[tuple[str, str, dict[str, Any], int, str | None]] = [
    ("GET", "/nowhere", {}, 404, "not_found"),
    ("GET", "/v1", {}, 404, "not_found"),
    ("POST", "/v1/completions/", {}, 404, "not_found"),
    ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
    ("PUT", "/v1/models", {}, 405, "method_not_allowed"),
    ("OPTIONS", "/v1/chat/completions", {}, 405, "method_not_allowed"),
    ("TRACE", "/health", {}, 405, "method_not_allowed"),
    ("POST", "/v1/completions", {"content": b"{"}, 400, "invalid_content_type"),
    (
        "POST",
        "/v1/completions",
        {"content": b"{}", "headers": {"content-type": "text/plain"}},
        400,
        "invalid_content_type",
    ),
    (
        "POST",
        "/v1/completions",
        {"content": b"{", "headers": {"content-type": "application/json"}},
        400,
        "invalid_json",
    ),
    (
        "POST",
        "/v1/completions",
        {"content": b"\xff\xfe", "headers": {"content-type": "application/json"}},
        400,
        "invalid_json",
    ),
    ("POST", "/v1/completions", {"json": []}, 400, None),
    ("POST", "/v1/completions", {"json": {"model": "nobody", "prompt": "x"}}, 404, "model_not_found"),
    ("GET", "/v1/models/nobody", {}, 404, "model_not_found"),
    ("GET", "/v1/models?novel=1", {}, 400, None),
    ("POST", "/v1/adapters", {"headers": {"content-type": "multipart/form-data"}}, 400, "invalid_form"),
    (
        "POST",
        "/v1/embeddings",
        {"content": b"{}", "headers": {"content-type": "application/json", "content-length": str(1 << 40)}},
        413,
        "body_too_large",
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "code"), CASES, ids=[f"{c[0]} {c[1]} {c[4]}" for c in CASES]
)
def test_refusals_have_one_shape(
    run: Any, open_site: Any, method: str, path: str, sent: dict[str, Any], status: int, code: str | None
) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.http.request(method, path, **sent)
            assert response.status_code == status, response.text
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-request-id"]
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("invalid_request_error", code)
            if status == 405:
                assert response.headers["allow"]

    run(body())


def test_head_has_the_headers_of_get_and_no_body(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for path in ("/health", "/ready", "/version", "/metrics", "/v1/models", "/tokenizer_info"):
                response = await site.http.head(path)
                assert (response.status_code, response.content) == (200, b""), path
                assert response.headers["x-request-id"]
            assert (await site.http.head("/v1/models/nobody")).status_code == 404
            assert (await site.http.head("/v1/completions")).status_code == 405

    run(body())
