"""The API side's handle on an engine: one protocol, an implementation per place the engine may live."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from onebase.serve.engine.messages import AdapterReady, AdapterUse, EngineInfo, EngineStats, Request, TokenOutput


class EngineClient(Protocol):
    """What the HTTP layer may ask of an engine."""

    @property
    def info(self) -> EngineInfo | None:
        """Known once the engine has been ready for the first time; stays known while it restarts."""

    @property
    def ready(self) -> bool:
        """Whether requests are served now."""

    @property
    def stats(self) -> EngineStats:
        """The latest gauges; never waits for the engine."""

    @property
    def restarts(self) -> int:
        """How often the engine process died and was started again."""

    async def start(self) -> None:
        """Start the engine and return once it is ready. Raises ModelRejected when the base cannot be served."""

    async def stop(self) -> None:
        """Stop the engine; requests in flight fail with EngineDead."""

    def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """Tokens as they come. Closing the generator early aborts the request. Raises EngineError or AdapterError."""

    async def load_adapter(self, use: AdapterUse) -> AdapterReady:
        """Compile against the base and make resident. Raises AdapterError."""

    async def unload_adapter(self, digest: str) -> bool:
        """Drop from the device once unused; False where it was not resident."""
