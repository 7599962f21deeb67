"""How much there is in a JSON text: exact where it matters, and refused before it is parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.serve.api import json_size as module
from onebase.serve.api.json_size import JsonSize, _counted, _without_strings, json_size

TEXT = st.text(st.sampled_from('{}[]:,"\\ aé\n'), max_size=12)
VALUES = st.recursive(
    TEXT | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def _size(value: Any) -> JsonSize:
    if not isinstance(value, list | dict):
        return JsonSize(0, 0, 0)
    inner = [_size(one) for one in (value.values() if isinstance(value, dict) else value)]
    keys = len(value) if isinstance(value, dict) else 0
    return JsonSize(
        1 + sum(one.nodes for one in inner),
        keys + sum(one.keys for one in inner),
        max(len(value) - 1, 0) + sum(one.values for one in inner),
    )


@given(VALUES, st.booleans())
def test_strings_are_not_counted(value: Any, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert _counted(_without_strings(data)) == _size(value)


def test_text_full_of_braces_is_no_excess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NODES", 3)
    assert json_size(json.dumps({"prompt": '{"[' * 50}).encode()).excess is None
    assert json_size(b'{"a":[[],[]]}').excess == "4 objects and lists, over 3"


BODIES = {
    "objects": b'{"model":"base","prompt":"x","metadata":[' + b"{}," * (1 << 17) + b"{}]}",
    "keys": b'{"model":"base","prompt":"x","metadata":{' + b",".join(b'"%d":0' % i for i in range(1 << 17)) + b"}}",
    "values": b'{"model":"base","prompt":[' + b"0," * ((1 << 20) + 1) + b"0]}",
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_too_many_things_are_refused_unparsed(
    run: Any, open_site: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with open_site() as site:
            monkeypatch.setattr("onebase.serve.api.completion_schemas.CompletionRequest.model_validate_json", None)
            sent = {"content": BODIES[kind], "headers": {"content-type": "application/json"}}
            response = await site.http.post("/v1/completions", **sent)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
            assert kind in response.json()["error"]["message"]

    run(body())
