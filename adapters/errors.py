"""The tree of exceptions that a user can act on. The HTTP layer maps them in one place.

OneBaseError
+-- AdapterError
|   +-- AdapterRejected      the files are not, or not safely, an adapter for this base   400
|   +-- AdapterTooLarge      over a size limit                                            413
|   +-- AdapterNameInvalid   the name does not match ADAPTER_NAME                         400
|   +-- AdapterNotFound      no such name or version                                      404
|   +-- AdapterConflict      the name is taken, or in use                                 409
+-- ModelRejected            the base model cannot be served exactly                      at start
+-- EngineError
    +-- EngineDead           the engine process died; it is being restarted               503
    +-- RequestRejected      the engine cannot run this request                           400
    +-- AdapterUnloaded      an adapter of the request was unloaded by force              409
"""

from __future__ import annotations


class OneBaseError(Exception):
    """Root of the tree. ``message`` says what is wrong and what is allowed; ``param`` names the offending field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class AdapterError(OneBaseError):
    """Something about an adapter."""


class AdapterRejected(AdapterError):
    """The files cannot be served exactly on this base; the message names the file, key or field."""


class AdapterTooLarge(AdapterError):
    """A file, tensor or rank is over its limit."""


class AdapterNameInvalid(AdapterError):
    """The adapter name does not match the allowed pattern."""


class AdapterNotFound(AdapterError):
    """No adapter has this name (or version)."""


class AdapterConflict(AdapterError):
    """The name is taken, or the adapter is in use."""


class ModelRejected(OneBaseError):
    """The base model's architecture or options cannot be served exactly."""


class EngineError(OneBaseError):
    """The engine could not do its work."""


class EngineDead(EngineError):
    """The engine process ended; requests in flight are lost, the supervisor restarts it."""


class RequestRejected(EngineError):
    """The engine refuses the request, and would refuse it again."""


class AdapterUnloaded(EngineError):
    """An adapter of the request was unloaded by force; the request is lost, and would be refused if sent again."""
