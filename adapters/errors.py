"""The tree of exceptions that a user can act on. The HTTP layer maps them in one place.

OneBaseError
+-- AdapterError
|   +-- AdapterRejected      the files are not, or not safely, an adapter for this base   400
|   +-- AdapterTooLarge      over a size limit                                            413
|   +-- AdapterNameInvalid   the name does not match ADAPTER_NAME                         400
|   +-- AdapterNotFound      no such name or version                                      404
|   +-- AdapterConflict      the name is taken, or in use                                 409
|   +-- SourceFailed         the place the files are fetched from is down, or lies        502
|   +-- StorageFailed        the data folder's disk refused a read or a write             500
|       +-- StorageFull      it has no room left, or a quota is used up                   507
|       +-- StorageUncertain its change may turn out to hold after a restart              500
+-- ModelRejected            the base model cannot be served exactly                      at start
+-- EngineError
    +-- EngineDead           the engine process died; it is being restarted               503
    +-- OutOfMemory          the device has no room for the request, even alone           503
    +-- RequestRejected      the engine cannot run this request                           400
    +-- RequestTimedOut      the request's own ``timeout`` is over                          408
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


class SourceFailed(AdapterError):
    """The remote an adapter is fetched from did not answer, or not as agreed. Trying again later may help."""


class StorageFailed(AdapterError):
    """The data folder's disk refused a read or a write. What was asked for did not happen; but see StorageUncertain."""


class StorageFull(StorageFailed):
    """The disk of the data folder, or a quota on it, is full."""


class StorageUncertain(StorageFailed):
    """A write failed, and so did undoing it: the change does not hold now, and may hold after a restart."""


class ModelRejected(OneBaseError):
    """The base model's architecture or options cannot be served exactly."""


class EngineError(OneBaseError):
    """The engine could not do its work."""


class EngineDead(EngineError):
    """The engine process ended; requests in flight are lost, the supervisor restarts it."""


class OutOfMemory(EngineError):
    """A forward of the request alone does not fit the device."""


class RequestRejected(EngineError):
    """The engine refuses the request, and would refuse it again."""


class RequestTimedOut(EngineError):
    """The request did not end within its ``timeout``; the client has given it up."""


class AdapterUnloaded(EngineError):
    """An adapter of the request was unloaded by force; the request is lost, and would be refused if sent again."""
