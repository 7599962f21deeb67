"""POST /v1/embeddings: its shape, its refusals, and the numbers of transformers over a real engine."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from onebase.serve.engine.messages import Request, TokenOutput

VECTOR = np.array([3.0, 4.0, 0.0, 12.0], np.float32)


def says(vector: Any = VECTOR) -> Any:
    def reply(request: Request) -> list[TokenOutput]:
        data = None if vector is None else (vector * request.prompt[0]).astype(np.float32).tobytes()
        return [TokenOutput(request.id, (), "length", cached_tokens=1, embedding=data)]

    return reply


def test_a_text_has_one_vector(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says()
            response = await site.post("/v1/embeddings", model="base", input="hello")
            assert response.status_code == 200, response.text
            (request,) = site.engine.requests
            assert (request.embeds, request.sampling.max_tokens) == ("last", 0)
            count = len(request.prompt)
            usage = {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
            answer = response.json()
            (item,) = answer.pop("data")
            assert answer == {
                "object": "list",
                "model": "base",
                "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 1}},
            }
            assert item.pop("embedding") == pytest.approx([3 / 13, 4 / 13, 0, 12 / 13])
            assert item == {"object": "embedding", "index": 0}

    run(body())


def test_options_shape_the_vector(run: Any, open_site: Any) -> None:
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({"dimensions": 2}, [0.6, 0.8]),
        ({"dimensions": 2, "normalize": False}, [9.0, 12.0]),
        ({"normalize": False}, [9.0, 12.0, 0.0, 36.0]),
        ({"dimensions": 4}, [3 / 13, 4 / 13, 0, 12 / 13]),
    ]

    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says()
            for options, expected in cases:
                for form in ("float", "base64"):
                    asked = {"model": "base", "input": [3, 5], "encoding_format": form, **options}
                    (item,) = (await site.post("/v1/embeddings", **asked)).json()["data"]
                    told = item["embedding"]
                    values = told if form == "float" else np.frombuffer(base64.b64decode(told), "<f4").tolist()
                    assert values == pytest.approx(expected), options
            await site.post("/v1/embeddings", model="base", input="x", pooling="mean")
            assert site.engine.requests[-1].embeds == "mean"

    run(body())


def test_several_inputs_come_in_order_and_zeros_stay_zeros(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says()
            asked = {"model": "base", "input": [[3], [0], [2]], "normalize": False}
            data = (await site.post("/v1/embeddings", **asked)).json()["data"]
            assert [item["index"] for item in data] == [0, 1, 2]
            assert [item["embedding"] for item in data] == [(VECTOR * n).tolist() for n in (3, 0, 2)]
            zeros = (await site.post("/v1/embeddings", model="base", input=[0])).json()["data"][0]["embedding"]
            assert zeros == [0, 0, 0, 0]
            assert len((await site.post("/v1/embeddings", model="base", input=["a", "b"])).json()["data"]) == 2

    run(body())


CASES: list[tuple[dict[str, Any], str]] = [
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": [300]}, "input"),
    ({"input": [5] * 257}, "input"),
    ({"input": ["x"] * 2049}, "input"),
    ({"model": None}, "model"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": 5}, "dimensions"),
    ({"dimensions": "2"}, "dimensions"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"pooling": "cls"}, "pooling"),
    ({"normalize": 1}, "normalize"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
]


def test_bad_requests_name_their_field(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says()
            for change, param in CASES:
                response = await site.post("/v1/embeddings", **{"model": "base", "input": "hello", **change})
                assert response.status_code == 400, change
                assert response.json()["error"]["param"] == param, change

    run(body())


def test_an_answer_has_a_bound(run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase.serve.api.pooled.MAX_VALUES", 8)

    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says()
            asked = {"model": "base", "input": [[3], [1], [2]]}
            response = await site.post("/v1/embeddings", **asked)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "input")
            assert (await site.post("/v1/embeddings", **asked, encoding_format="base64")).status_code == 200

    run(body())


def test_vectors_are_those_of_transformers(run: Any, open_real: Any, real_folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(real_folder).eval()

    async def body() -> None:
        async with open_real() as site:
            texts = ["hello world", "the quick brown fox"]
            for pooling in ("last", "mean"):
                found = await site.post("/v1/embeddings", model="base", input=texts, pooling=pooling)
                for text, item in zip(texts, found.json()["data"], strict=True):
                    with torch.inference_mode():
                        states = model(input_ids=torch.tensor([site.encode(text)])).last_hidden_state[0]
                    wanted = states.mean(0) if pooling == "mean" else states[-1]
                    assert item["embedding"] == pytest.approx((wanted / wanted.norm()).tolist(), abs=1e-4)

    run(body())
