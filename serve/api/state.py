"""What one server holds, handed to the routes through ``app.state``; there are no other globals."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

from fastapi import Request

from onebase.serve.api.admission import Admission, Reservation
from onebase.serve.api.errors import not_ready
from onebase.serve.api.grammar_checker import GrammarChecker
from onebase.serve.config import Settings
from onebase.serve.engine.client import EngineClient
from onebase.serve.engine.messages import EngineInfo
from onebase.serve.tenants import Keyring

if TYPE_CHECKING:
    from onebase.serve.api.codecs import Codecs
    from onebase.serve.api.imports import Importer
    from onebase.serve.api.store import AdapterStore
    from onebase.serve.api.tokenizer import TextCodec, Workers
    from onebase.serve.metrics import Metrics

VERSION = version("onebase")
PARSERS = 2
CHARS_PER_TOKEN = 32  # prose has 4 or 5 in a token, code with deep indents fewer than 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """What exists once the engine has been ready for the first time."""

    info: EngineInfo
    codec: TextCodec
    codecs: Codecs
    workers: Workers
    store: AdapterStore
    imports: Importer
    created: int  # unix seconds; what /v1/models says of the base

    @property
    def max_chars(self) -> int:
        """Of a prompt. Far over what fits the context, and no more work than one prompt may be."""
        return self.info.max_model_len * CHARS_PER_TOKEN

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: equal where base weights and server version are."""
        return f"onebase-{VERSION}-{self.info.fingerprint[:12]}"


@dataclass(slots=True)
class Server:
    """``loaded`` is set when start-up is complete; ``failure`` when it cannot complete, and the server ends.

    parsers: threads for long bodies, of their own so that a few of them do not hold up the registry's calls.
    """

    settings: Settings
    engine: EngineClient
    metrics: Metrics
    admission: Admission
    keyring: Keyring = field(default_factory=Keyring)
    loaded: Loaded | None = None
    failure: str | None = None
    parsers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PARSERS, "parse"))
    grammars: GrammarChecker = field(default_factory=GrammarChecker)
    on_ready: list[Callable[[], None]] = field(default_factory=list)
    on_failure: list[Callable[[], None]] = field(default_factory=list)

    def require_loaded(self) -> Loaded:
        """Registry and tokenizer, whether or not the engine lives. Raises ApiError 503 while starting."""
        if self.loaded is None:
            raise not_ready(self.failure or "The model is still being loaded.")
        return self.loaded

    def require_ready(self) -> Loaded:
        """What inference needs. Raises ApiError 503 while starting and while the engine is down."""
        loaded = self.require_loaded()
        if not self.engine.ready:
            raise not_ready("The engine is being restarted.")
        return loaded


def server_of(request: Request) -> Server:
    return cast(Server, request.app.state.server)


def admission_of(request: Request) -> Reservation:
    """What a request reserves from: its tenant's limits and the server's. Behind require_api_key."""
    return server_of(request).admission.of(request.state.tenant)
