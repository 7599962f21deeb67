"""Lists in pages: keyset cursors, filters, and query strings as strict as bodies."""

from __future__ import annotations

from typing import Any

import pytest

NAMES = [f"n{index:02}" for index in range(7)]


async def fill(site: Any, adapter_folder: Any) -> None:
    folder = adapter_folder()
    for name in NAMES:
        assert (await site.upload(name, folder)).status_code == 201


async def names(site: Any, **params: Any) -> list[str]:
    """Of all pages, two names a page."""
    found: list[str] = []
    while True:
        page = (await site.http.get("/v1/adapters", params={"limit": 2, **params})).json()
        assert len(page["data"]) <= 2
        found += [card["name"] for card in page["data"]]
        assert page["has_more"] is (page["next"] is not None)
        if not page["has_more"]:
            return found
        params["after"] = page["next"]


def test_pages_and_filters(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await fill(site, adapter_folder)
            for name, labels in (("n01", {"team": "a"}), ("n02", {"team": "a", "env": "b:c"}), ("n03", {"team": "b"})):
                assert (await site.http.patch(f"/v1/adapters/{name}", json={"labels": labels})).status_code == 200
            await site.http.patch("/v1/adapters/n05", json={"pinned": True})
            assert await names(site) == NAMES
            assert await names(site, label="team:a") == ["n01", "n02"]
            assert await names(site, label=["team:a", "env:b:c"]) == ["n02"]
            assert await names(site, pinned="true") == ["n05"]
            assert await names(site, pinned="false", prefix="n0") == [name for name in NAMES if name != "n05"]
            assert await names(site, prefix="x") == []
            assert await names(site, after="n04") == ["n05", "n06"]
            assert await names(site, after="n04zzz") == ["n05", "n06"], "a cursor need not be a name that is there"
            assert await names(site, state="ready") == NAMES
            assert await names(site, state="failed") == []

    run(body())


def test_a_page_that_is_exactly_full_has_no_next(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await fill(site, adapter_folder)
            page = (await site.http.get("/v1/adapters", params={"limit": len(NAMES)})).json()
            assert (len(page["data"]), page["has_more"], page["next"]) == (len(NAMES), False, None)

    run(body())


def test_models_are_paged_behind_the_base(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            await fill(site, adapter_folder)
            first = (await site.http.get("/v1/models", params={"limit": 3})).json()
            assert [card["id"] for card in first["data"]] == ["base", *NAMES[:3]]
            assert (first["has_more"], first["next"]) == (True, NAMES[2])
            last = (await site.http.get("/v1/models", params={"limit": 4, "after": NAMES[2]})).json()
            assert [card["id"] for card in last["data"]] == NAMES[3:]
            assert {card["parent"] for card in last["data"]} == {"base"}
            assert last["has_more"] is False

    run(body())


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("limit=1e3", "limit"),
        ("limit=" + "9" * 400, "limit"),
        ("limit=5&limit=6", "limit"),
        ("limit=", "limit"),
        ("after=" + "x" * 5000, "after"),
        ("prefix=" + "x" * 5000, "prefix"),
        ("label=nocolon", "label"),
        ("label=a:1&label=a:2", "label"),
        ("&".join(["label=a:b"] * 100), "label"),
        ("pinned=maybe", "pinned"),
        ("state=deleted", "state"),
        ("state=", "state"),
        ("order=desc", "order"),
        ("Limit=5", "Limit"),
        ("a.b=5", "a.b"),
    ],
)
def test_bad_parameters_are_400_and_named(run: Any, open_site: Any, query: str, named: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.http.get(f"/v1/adapters?{query}")
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == named
            assert named in response.json()["error"]["message"]

    run(body())


@pytest.mark.parametrize("after", ["\x00", "../..", "\N{FOX FACE}", "'; DROP TABLE names;--", "~", "\x7f\x7f"])
def test_cursors_that_are_no_names_are_only_places(run: Any, open_site: Any, adapter_folder: Any, after: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            await fill(site, adapter_folder)
            response = await site.http.get("/v1/adapters", params={"after": after})
            assert response.status_code == 200, response.text
            assert {card["name"] for card in response.json()["data"]} <= set(NAMES)

    run(body())


def test_a_label_that_is_no_pair_is_named(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.http.get("/v1/adapters?label=a:b&label=team")
            assert response.json()["error"]["message"] == "label: 'team' is not key:value."

    run(body())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters/n"),
        ("GET", "/v1/adapters/n/versions"),
        ("PATCH", "/v1/adapters/n"),
        ("DELETE", "/v1/adapters/n"),
        ("POST", "/v1/adapters"),
        ("POST", "/v1/adapters/n/load"),
        ("POST", "/v1/adapters/n/unload"),
        ("POST", "/v1/adapters/n/rollback"),
        ("POST", "/v1/registry/gc"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/base"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/classify"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"),
    ],
)
def test_no_route_ignores_a_parameter(run: Any, open_site: Any, method: str, path: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.http.request(method, f"{path}?force_it=true")
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == "force_it"

    run(body())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/v1/adapters/n"),
        ("POST", "/v1/adapters/n/load"),
        ("POST", "/v1/adapters/n/unload"),
        ("GET", "/v1/adapters/n"),
        ("GET", "/v1/models"),
    ],
)
def test_no_route_ignores_a_body(run: Any, open_site: Any, adapter_folder: Any, method: str, path: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            await site.upload("n", adapter_folder("n"))
            response = await site.http.request(method, path, json={"force": True})
            assert response.status_code == 400, response.text
            assert "takes no body" in response.json()["error"]["message"]
            assert (await site.http.request(method, path, content=b"")).status_code == 200

    run(body())
