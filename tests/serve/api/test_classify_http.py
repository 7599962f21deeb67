"""POST /v1/classify: its shape, its refusals, and the numbers of PEFT over a real engine."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from onebase.adapters.errors import RequestRejected
from onebase.serve.engine.messages import ClassLogits, Request, TokenOutput

LOGITS = np.array([[1.0, 3.0, 2.0], [0.5, -1000.0, 0.25], [9.0, 9.0, 10.0]], np.float32)


def _softmax(row: Any) -> list[float]:
    values: list[float] = torch.softmax(torch.tensor(row, dtype=torch.float64), -1).tolist()
    return values


def says(*chunks: Any, per_token: bool = False) -> Any:
    """A reply of the fake engine: one output for each array of logits, then the end."""

    def reply(request: Request) -> list[TokenOutput]:
        told = [ClassLogits(chunk.shape[1], per_token, chunk.astype(np.float32).tobytes()) for chunk in chunks]
        outputs = [TokenOutput(request.id, (), classes=one) for one in told]
        return [*outputs, TokenOutput(request.id, (), "length", cached_tokens=1)]

    return reply


def test_a_text_has_one_label(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says(LOGITS[:1])
            response = await site.post("/v1/classify", model="base", input="hello")
            assert response.status_code == 200, response.text
            assert response.headers["x-onebase-adapters"] == "base"
            answer = response.json()
            (request,) = site.engine.requests
            assert request.classifies
            assert request.sampling.max_tokens == 0
            assert list(request.prompt) == site.encode("hello")
            count = len(request.prompt)
            assert answer.pop("id") == f"classify-{response.headers['x-request-id']}"
            assert isinstance(answer.pop("created"), int)
            (item,) = answer.pop("data")
            assert item.pop("probs") == pytest.approx(_softmax(LOGITS[0]))
            assert item == {"index": 0, "label": "LABEL_1", "num_classes": 3}
            details = {"cached_tokens": 1}
            usage = {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
            assert answer == {
                "object": "list",
                "model": "base",
                "usage": {**usage, "prompt_tokens_details": details},
            }
            metrics = (await site.http.get("/metrics")).text
            assert f'onebase_request_prompt_tokens_total{{model="base"}} {count}' in metrics
            assert 'onebase_http_requests_total{route="/v1/classify",status="200"} 1.0' in metrics
            assert "onebase_request_seconds_count 1.0" in metrics

    run(body())


@pytest.mark.parametrize("long_answer", [0, 1 << 14], ids=["written in a thread", "written at once"])
def test_tokens_have_a_label_each(run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch, long_answer: int) -> None:
    monkeypatch.setattr("onebase.serve.api.writing.LONG_ANSWER", long_answer)

    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says(LOGITS[:2], LOGITS[2:], per_token=True)
            answer = (await site.post("/v1/classify", model="base", input=[70, 71, 72])).json()
            (item,) = answer["data"]
            assert (item["index"], item["num_classes"]) == (0, 3)
            assert [one["label"] for one in item["tokens"]] == ["LABEL_1", "LABEL_0", "LABEL_2"]
            assert [one["index"] for one in item["tokens"]] == [0, 1, 2]
            for one, row in zip(item["tokens"], LOGITS, strict=True):
                assert one["probs"] == pytest.approx(_softmax(row))

    run(body())


def test_several_inputs_come_in_order_and_logits_on_demand(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = lambda request: says(LOGITS[:1] * request.prompt[0])(request)
            asked = {"model": "base", "input": [[3], [1], [2]], "use_activation": False}
            answer = (await site.post("/v1/classify", **asked)).json()
            assert [item["index"] for item in answer["data"]] == [0, 1, 2]
            assert [item["probs"] for item in answer["data"]] == [(LOGITS[0] * n).tolist() for n in (3, 1, 2)]
            assert answer["usage"]["prompt_tokens"] == 3
            texts = await site.post("/v1/classify", model="base", input=["a", "b"])
            assert len(texts.json()["data"]) == 2

    run(body())


@pytest.mark.parametrize(("logit", "expected"), [(0.0, 0.5), (-1000.0, 0.0), (1000.0, 1.0), (1.0, 0.7310585786300049)])
def test_a_single_label_has_a_sigmoid(run: Any, open_site: Any, logit: float, expected: float) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says(np.array([[logit]]))
            answer = (await site.post("/v1/classify", model="base", input="x")).json()
            assert answer["data"][0]["probs"] == [pytest.approx(expected)]

    run(body())


CASES: list[tuple[dict[str, Any], str]] = [
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": [1, "a"]}, "input.1"),
    ({"input": ["x"] * 2049}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": ""}, "input"),
    ({"input": [300]}, "input"),
    ({"input": [5] * 257}, "input"),
    ({"input": "x" * 100_000}, "input"),
    ({"model": None}, "model"),
    ({"use_activation": 1}, "use_activation"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"adapters": [{"name": "a", "scale": "1"}]}, "adapters.0.scale"),
]


def test_bad_requests_name_their_field(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for change, param in CASES:
                response = await site.post("/v1/classify", **{"model": "base", "input": "hello", **change})
                assert response.status_code == 400, change
                assert response.json()["error"]["param"] == param, change
            missing = await site.post("/v1/classify", model="nobody", input="hello")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
            assert not site.engine.requests
            site.engine.failure = RequestRejected("the model has no classification head", param="model")
            refused = await site.post("/v1/classify", model="base", input="hello")
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (400, "request_rejected", "model")

    run(body())


def test_keys_and_budgets_hold_here_too(run: Any, open_site: Any) -> None:
    async def body() -> None:
        async with open_site(api_key="secret", max_num_seqs=2, max_inflight_seqs=2, max_inflight_tokens=5) as site:
            assert (await site.post("/v1/classify", model="base", input="x")).status_code == 401
            site.http.headers["authorization"] = "Bearer secret"
            for given in (["x"] * 3, [5] * 6):
                response = await site.post("/v1/classify", model="base", input=given)
                assert (response.status_code, response.json()["error"]["param"]) == (400, "input")
            site.engine.pause = asyncio.Event()
            site.engine.reply = says(LOGITS[:1])
            first = asyncio.create_task(site.post("/v1/classify", model="base", input=[[5], [6]]))
            while len(site.engine.requests) < 2:
                await asyncio.sleep(0.001)
            assert (await site.post("/v1/classify", model="base", input="x")).status_code == 429
            site.engine.pause.set()
            assert (await first).status_code == 200
            admission = site.server.admission
            assert (admission.sequences.taken, admission.tokens.taken) == (0, 0)

    run(body())


def test_an_answer_has_a_bound(run: Any, open_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase.serve.api.pooled.MAX_VALUES", 8)

    async def body() -> None:
        async with open_site() as site:
            site.engine.reply = says(LOGITS[:2], LOGITS[2:], per_token=True)
            response = await site.post("/v1/classify", model="base", input=[70, 71, 72])
            assert (response.status_code, response.json()["error"]["param"]) == (400, "input")
            assert "8 probabilities" in response.json()["error"]["message"]
            assert site.engine.aborted, "the engine need not go on"

    run(body())


@pytest.fixture
def trained(real_folder: Path, tmp_path: Path) -> tuple[Path, Any]:
    """An adapter of a sequence classifier as PEFT saves it, and PEFT's own model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(real_folder, num_labels=4)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "down_proj"])
        adapted: Any = peft.get_peft_model(model, config).eval()
        torch.manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier", adapted


def test_probabilities_are_those_of_peft(run: Any, open_real: Any, trained: tuple[Path, Any]) -> None:
    folder, model = trained

    async def body() -> None:
        async with open_real(adapter=(f"judge={folder}",)) as site:
            texts = ["hello world", "the quick brown fox", "assistant:"]
            asked = site.post("/v1/classify", model="judge", input=texts)
            found, told = await asyncio.gather(asked, site.complete(model="judge", max_tokens=4, temperature=0))
            assert told.status_code == 200, "its body generates"
            assert found.headers["x-onebase-adapters"] == "judge@1;scale=1"
            for text, item in zip(texts, found.json()["data"], strict=True):
                with torch.inference_mode():
                    logits = model(input_ids=torch.tensor([site.encode(text)])).logits[0]
                assert item["probs"] == pytest.approx(torch.softmax(logits, -1).tolist(), abs=1e-4)
            refused = await site.post("/v1/classify", model="base", input="hello")
            assert refused.status_code == 400
            assert "no classification head" in refused.json()["error"]["message"]

    run(body())
