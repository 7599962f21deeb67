"""schemathesis over the whole OpenAPI document: what it makes of each operation, and of operations in a row.

No 5xx, no answer that the document does not have, no body that it does not describe, and nothing accepted that it
forbids. The engine is a real one, over a tiny model.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
import uvicorn
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from onebase.serve.api.app import create_app
from onebase.serve.config import Settings
from onebase.serve.engine.inprocess import InProcessEngine

CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "use_after_free",
)
NAMES = ("base", "tuned", "tuned@1", "nobody")
FEW = hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate],
)


class Served:
    """The application over uvicorn and a real engine, in a thread of its own; it takes adapters from one folder."""

    def __init__(self, settings: Settings) -> None:
        app = create_app(settings, InProcessEngine(settings.engine_config()))  # type: ignore[arg-type]
        self.document = app.openapi()
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)

    def start(self) -> str:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        while requests.get(f"{url}/ready", timeout=10).status_code != 200:
            pass
        return url

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("schemathesis")


@pytest.fixture(scope="module")
def lora(folder: Path, make_lora_files: Any) -> Path:
    return make_lora_files(folder / "lora", seed=1, width=32)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def schema(real_folder: Path, folder: Path, lora: Path) -> Iterator[Any]:
    """The document, bound to a server. Names and sources that exist are drawn often enough to matter."""
    settings = Settings(
        model=str(real_folder),
        served_model_name="base",
        data_dir=folder / "data",
        dtype="float32",
        device="cpu",
        kv_memory="0.01",
        adapter_memory="0.01",
        adapter=(f"tuned={lora}",),
        allow_path=(folder,),
        insecure=True,
    )
    served = Served(settings)
    loaded = schemathesis.openapi.from_dict(served.document)
    loaded.config.update(base_url=served.start())
    loaded.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    _use_what_exists(loaded, lora)
    yield loaded
    served.stop()


def _use_what_exists(schema: Any, lora: Path) -> None:
    """Random names lead to 404 and nothing else."""

    @schema.hook
    def map_body(context: Any, body: Any) -> Any:
        if isinstance(body, dict):
            if isinstance(body.get("model"), str):
                body["model"] = NAMES[len(body["model"]) % len(NAMES)]
            for field in {"source", "lora_path"} & body.keys():
                body[field] = str(lora)
            for field in {"max_tokens", "max_completion_tokens"} & body.keys():
                if isinstance(body[field], int) and body[field] > 0:
                    body[field] = body[field] % 8 + 1
        return body

    @schema.hook
    def map_path_parameters(context: Any, path_parameters: Any) -> Any:
        for field in {"name", "model"} & (path_parameters or {}).keys():
            value = str(path_parameters[field])
            path_parameters[field] = NAMES[len(value) % len(NAMES)] if len(value) % 2 else value
        return path_parameters


def _checks() -> list[Any]:
    return [CHECKS.get_one(name) for name in CHECKED]


def _try(schema: Any, settings: hypothesis.settings, lora: Path) -> None:
    """Each operation by itself; whatever the others did, ``tuned`` is there when it begins."""
    succeeded = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        made = {"name": "tuned", "source": str(lora)}
        assert requests.post(f"{schema.config.base_url}/v1/adapters", json=made, timeout=60).status_code == 201

        @settings
        @hypothesis.given(case=operation.as_strategy())
        def one(case: Any) -> None:
            response = case.call_and_validate(checks=_checks(), timeout=60)
            if response.status_code < 300:
                succeeded.add(case.operation.label)

        one()
    assert len(succeeded) > 15, "hardly more than refusals"


def _walk(schema: Any, settings: hypothesis.settings, walks: int = 1) -> int:
    """How many requests were sent. Where an answer changes what is drawn next hypothesis ends a walk as flaky."""
    sent = 0

    class Walk(schema.as_state_machine()):  # type: ignore[misc]
        def validate_response(self, response: Any, case: Any, **more: Any) -> None:
            nonlocal sent
            sent += 1
            case.validate_response(response, checks=_checks())

    for _ in range(walks):
        with contextlib.suppress(hypothesis.errors.FlakyStrategyDefinition):
            Walk.run(settings=settings)
    return sent


def test_every_operation(schema: Any, lora: Path) -> None:
    _try(schema, FEW, lora)


def test_operations_in_a_row(schema: Any) -> None:
    assert _walk(schema, hypothesis.settings(FEW, max_examples=10, stateful_step_count=8)) > 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_operation_at_length(schema: Any, lora: Path) -> None:
    _try(schema, hypothesis.settings(FEW, max_examples=200, derandomize=False), lora)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_operations_in_a_row_at_length(schema: Any) -> None:
    long = hypothesis.settings(FEW, max_examples=20, stateful_step_count=20, derandomize=False)
    assert _walk(schema, long, walks=20) > 1000
