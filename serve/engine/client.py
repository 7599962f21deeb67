"""The API side's handle on an engine: one protocol, an implementation per place the engine may live."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
    AdapterUse,
    EngineInfo,
    EngineStats,
    Request,
    TokenOutput,
)

Tier = Literal["device", "host", "disk"]


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

    async def unload_adapter(self, digest: str, *, force: bool = False) -> AdapterGone:
        """Drop from device and host memory. Returns once the bytes are back, so after the last request that uses it;
        with ``force`` such requests fail with AdapterUnloaded. Raises AdapterConflict where it was loaded meanwhile."""

    def set_pins(self, uses: Sequence[AdapterUse]) -> None:
        """All adapters that are to be on the device whatever the traffic. Does nothing while the engine is down: to be
        said again after every start."""

    def tier(self, digest: str) -> Tier:
        """Where the adapter is, as far as the engine has said; never waits for it."""
