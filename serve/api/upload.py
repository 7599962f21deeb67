"""Multipart uploads, written to the registry's stage as they arrive: nothing is kept in memory or spooled elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from onebase.adapters.registry.blobs import Blob, Stage, StageFile
from onebase.serve.api.body import capped
from onebase.serve.api.errors import ApiError, bad_request
from onebase.serve.api.state import server_of
from onebase.serve.api.store import AdapterStore

FORM_OVERHEAD = 1 << 20  # bytes that boundaries and headers may add to the files
WRITE_BYTES = 1 << 20
MAX_PARTS = 64
MAX_FIELD_BYTES = 256
MAX_BOUNDARY = 70  # RFC 2046


async def receive_adapter(request: Request, store: AdapterStore) -> tuple[str, Blob]:
    """The form's name and its files, checked and durable. Whatever fails, a client that leaves too, leaves no trace.

    Raises ApiError and AdapterError.
    """
    max_bytes = server_of(request).settings.max_upload_bytes
    async with _in_thread(store.registry.stage()) as stage:
        name = await receive_files(request, stage, max_bytes, store.check_new_name)
        return name, await asyncio.to_thread(stage.finish)


async def receive_files(request: Request, stage: Stage, max_bytes: int, check_name: Callable[[str], str]) -> str:
    """Fills the stage from the form and returns its ``name`` field, which is checked as soon as it is there."""
    form = UploadForm(stage, _boundary(request), check_name)
    with ExitStack() as cleanup:
        cleanup.callback(form.close)
        pending = bytearray()
        async for chunk in capped(request, max_bytes + FORM_OVERHEAD):
            pending += chunk
            if len(pending) >= WRITE_BYTES:
                await asyncio.to_thread(form.write, bytes(pending))
                pending.clear()
        await asyncio.to_thread(form.write, bytes(pending))
    return form.name


class UploadForm:
    """Parser callbacks: ``name`` is a field, every ``files`` part goes to the stage under its own file name."""

    def __init__(self, stage: Stage, boundary: bytes, check_name: Callable[[str], str]) -> None:
        self._stage = stage
        self._check_name = check_name
        self._parts = 0
        self._headers: dict[str, bytes] = {}
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._file: StageFile | None = None
        self._field: bytearray | None = None
        self._name: str | None = None
        self._complete = False
        self._parser = MultipartParser(boundary, self._callbacks())

    def write(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise bad_request(f"The multipart form is malformed: {error}.", code="invalid_form") from error

    @property
    def name(self) -> str:
        """Raises ApiError 400 for a form that was cut short or has no name."""
        if not self._complete:
            raise bad_request("The multipart form ends before its closing boundary.", code="invalid_form")
        if self._name is None:
            raise bad_request("name: this field is required.", "name")
        return self._name

    def close(self) -> None:
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise bad_request(f"The form has more than {MAX_PARTS} parts.", "files")
        self._headers = {}

    def _on_header_end(self) -> None:
        key, value = self._header
        self._headers[key.decode("latin-1").lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition"))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in options and field == "files":
            self._file = self._stage.open(options[b"filename"].decode("utf-8", "replace"))
        elif field == "name" and b"filename" not in options and self._name is None:
            self._field = bytearray()
        else:
            raise _unknown(field)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
        elif self._field is not None:
            self._field += data[start:end]
            if len(self._field) > MAX_FIELD_BYTES:
                raise bad_request(f"name: longer than {MAX_FIELD_BYTES} bytes.", "name")

    def _on_part_end(self) -> None:
        if self._field is not None:
            self._name = self._check_name(self._field.decode("utf-8", "replace"))
            self._field = None
        self.close()

    def _on_end(self) -> None:
        self._complete = True


@asynccontextmanager
async def _in_thread(stage: AbstractContextManager[Stage]) -> AsyncGenerator[Stage, None]:
    """The stage makes and removes a folder of files, which may be large."""
    opened = await asyncio.to_thread(stage.__enter__)
    try:
        yield opened
    finally:
        await asyncio.shield(asyncio.to_thread(stage.__exit__, None, None, None))


def _unknown(field: str) -> ApiError:
    return bad_request(
        f"{field[:100] or 'part'}: the form has one text field, name, and files named files.", field[:100]
    )


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= MAX_BOUNDARY:
        raise bad_request(f"The Content-Type needs a boundary of 1 to {MAX_BOUNDARY} bytes.", code="invalid_form")
    return boundary
