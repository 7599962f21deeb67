"""The way of remote bytes into a stage: which names are taken, how long it may take, whether a length was a lie."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from onebase.adapters.check import CONFIG_FILE, TOKENIZER_FILES, FileRole, file_role
from onebase.adapters.errors import AdapterRejected, SourceFailed
from onebase.adapters.registry.blobs import Stage

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a remote may take: ``grace`` seconds in all, and one more for every ``rate`` bytes that came.

    idle: seconds for a single read or for connecting. The size is the stage's to limit.
    """

    grace: float = 60.0
    rate: int = 256 << 10
    idle: float = 20.0


class Patience:
    """The time that is left of one fetch. ``stop`` ends it at once, at shutdown."""

    def __init__(self, limits: Limits, stop: threading.Event) -> None:
        self._limits = limits
        self._stop = stop
        self._end = time.monotonic() + limits.grace

    def left(self) -> float:
        """Seconds that the next read may take. Raises SourceFailed when the time is over."""
        left = self._end - time.monotonic()
        if self._stop.is_set():
            raise SourceFailed("The server is stopping.", param="source")
        if left <= 0:
            raise SourceFailed(
                f"The source is too slow: it has {self._limits.grace:g} seconds, and one more for every "
                f"{self._limits.rate} bytes it sent.",
                param="source",
            )
        return min(left, self._limits.idle)

    def received(self, nbytes: int) -> None:
        self._end += nbytes / self._limits.rate
        self.left()


class Intake:
    """One fetch: the stage it fills, the time it has. Remote sources write through this alone."""

    def __init__(self, stage: Stage, limits: Limits, stop: threading.Event) -> None:
        self.stage = stage
        self.limits = limits
        self.patience = Patience(limits, stop)

    def write(self, name: str, chunks: Iterable[bytes], length: int | None) -> None:
        """Write a file as it comes. Raises SourceFailed where it is not as long as was said, AdapterTooLarge."""
        total = 0
        with self.stage.open(name) as file:
            for chunk in chunks:
                total += file.write(chunk)
                self.patience.received(len(chunk))
        if length is not None and total != length:
            raise SourceFailed(f"{name}: {length} bytes were announced, {total} came.", param="source")


def wanted_files(names: Iterable[str]) -> tuple[str, ...]:
    """Of a folder's listing, the files to fetch: the config, *.safetensors and the tokenizer's; others are left there.

    Raises AdapterRejected where one is missing, with the way out if all there is is a pickle, and for files that
    change what the adapter means.
    """
    listed = sorted(set(names))
    wanted = tuple(name for name in listed if _is_about_adapter(name) and file_role(name) is not FileRole.IGNORED)
    if CONFIG_FILE not in wanted:
        raise AdapterRejected(f"There is no {CONFIG_FILE} at the source.", param="source")
    if not any(file_role(name) is FileRole.TENSORS for name in wanted):
        for name in listed:
            if name.startswith("adapter_") and name.endswith(_PICKLES):
                file_role(name)
        raise AdapterRejected("There is no adapter_model.safetensors at the source.", param="source")
    return wanted


def _is_about_adapter(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        or name in TOKENIZER_FILES
        or (name.startswith("adapter_") and name.endswith(".json"))
    )
