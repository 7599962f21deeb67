"""A folder as a multipart form, sent as it is read: memory does not grow with the adapter."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from onebase.adapters.check import served_files

CHUNK_BYTES = 1 << 20

Progress = Callable[[int], None]  # bytes that went since the last call


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """The form of POST /v1/adapters: ``name``, and the served files of ``folder`` as parts named ``files``.

    Raises AdapterRejected where the folder is no adapter folder.
    """

    name: str
    folder: Path
    told: Progress = lambda sent: None
    boundary: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def content_type(self) -> str:
        return f"multipart/form-data; boundary={self.boundary}"

    @property
    def nbytes(self) -> int:
        """Of the whole body."""
        heads = sum(len(self._head(file)) + file.stat().st_size + 2 for file in self._files())
        return len(self._first()) + heads + len(self._last())

    def chunks(self) -> Iterator[bytes]:
        for chunk in self._parts():
            yield chunk
            self.told(len(chunk))

    def _parts(self) -> Iterator[bytes]:
        yield self._first()
        for file in self._files():
            yield self._head(file)
            with file.open("rb") as reader:
                while chunk := reader.read(CHUNK_BYTES):
                    yield chunk
            yield b"\r\n"
        yield self._last()

    def _files(self) -> tuple[Path, ...]:
        return served_files(self.folder)

    def _first(self) -> bytes:
        return f'--{self.boundary}\r\nContent-Disposition: form-data; name="name"\r\n\r\n{self.name}\r\n'.encode()

    def _head(self, file: Path) -> bytes:
        """File names that are served have no character that would need escapes."""
        return (
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()

    def _last(self) -> bytes:
        return f"--{self.boundary}--\r\n".encode()
