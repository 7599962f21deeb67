"""Connections to addresses that were checked, and to no others: what a second look-up would say does not matter.

The host's name still goes into the TLS handshake and is what the certificate has to be for. Every wait is bounded by
the fetch's patience.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence
from typing import Any

import httpcore2

from onebase.adapters.sources.intake import Patience
from onebase.adapters.sources.location import IPAddress


class PinnedBackend(httpcore2.NetworkBackend):
    """Opens connections to the first of ``addresses`` that answers, whatever host is asked for."""

    def __init__(self, addresses: Sequence[IPAddress], patience: Patience) -> None:
        self._addresses = addresses
        self._patience = patience
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        *others, last = self._addresses
        for address in others:
            try:
                return self._connect(address, port)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return self._connect(last, port)

    def _connect(self, address: IPAddress, port: int) -> httpcore2.NetworkStream:
        return _PatientStream(self._sockets.connect_tcp(str(address), port, self._patience.left()), self._patience)


class _PatientStream(httpcore2.NetworkStream):
    """A stream whose reads and writes get the time that is left, so that dripping headers end too."""

    def __init__(self, stream: httpcore2.NetworkStream, patience: Patience) -> None:
        self._stream = stream
        self._patience = patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._patience.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._patience.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        secure = self._stream.start_tls(ssl_context, server_hostname, self._patience.left())
        return _PatientStream(secure, self._patience)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
