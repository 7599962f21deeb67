"""Folders at https addresses below those that the operator allows.

The host is looked up once and checked, and the connection goes to that address. There are no redirects, no proxies from
the environment, no cookies and no credentials.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onebase.adapters.check import CONFIG_FILE, TOKENIZER_FILES
from onebase.adapters.errors import AdapterRejected, SourceFailed
from onebase.adapters.sources.addresses import LookUp, addresses_of, system_look_up
from onebase.adapters.sources.answers import check_status, content_length
from onebase.adapters.sources.intake import Intake
from onebase.adapters.sources.location import IPAddress, Url

if TYPE_CHECKING:
    import httpcore2

FILES = (CONFIG_FILE, "adapter_model.safetensors")
OPTIONAL_FILES = tuple(TOKENIZER_FILES)  # an address lists nothing: each is asked for


class WebSource:
    """``https://host/folder``, below which lie the two FILES, and the OPTIONAL_FILES where it has them; http to this
    machine, where the operator names it."""

    def __init__(
        self, allowed: Sequence[Url], look_up: LookUp = system_look_up, context: ssl.SSLContext | None = None
    ) -> None:
        """context: None trusts the authorities that the system trusts (or SSL_CERT_FILE names)."""
        self._allowed = allowed
        self._look_up = look_up
        self._context = context

    def check(self, source: str, revision: str | None) -> None:
        if revision is not None:
            raise AdapterRejected("revision: an address has none.", param="revision")
        self._parse(source)

    def fetch(self, source: str, revision: str | None, intake: Intake) -> None:
        import httpcore2

        self.check(source, revision)
        url, named = self._parse(source)
        addresses = addresses_of(url, self._look_up, named=named)
        try:
            self._get_all(url, addresses, intake)
        except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError) as error:
            raise SourceFailed(f"{url.host} cannot be read: {type(error).__name__}.", param="source") from error

    def _parse(self, source: str) -> tuple[Url, bool]:
        """The address, and whether the entry that allows it names its host as an address or localhost."""
        if not self._allowed:
            raise AdapterRejected("Loading from https addresses is off; --allow-url turns it on.", param="source")
        url = Url.parse(source)
        entry = next((entry for entry in self._allowed if url.is_below(entry)), None)
        if entry is None:
            raise AdapterRejected("The source is not below an --allow-url.", param="source")
        return url, entry.address is not None or entry.is_local

    def _get_all(self, url: Url, addresses: Sequence[IPAddress], intake: Intake) -> None:
        import httpcore2

        from onebase.adapters.sources.pinned import PinnedBackend

        backend = PinnedBackend(addresses, intake.patience)
        with httpcore2.ConnectionPool(self._context, max_connections=1, network_backend=backend) as pool:
            for name in FILES + OPTIONAL_FILES:
                _get(pool, url, name, intake)


def _get(pool: httpcore2.ConnectionPool, url: Url, name: str, intake: Intake) -> None:
    """An optional file is left out where the answer says that there is none, or shows it to nobody; a source that fails
    fails the fetch: the adapter would be served with another tokenizer."""
    import httpcore2

    target = "/" + "/".join((*url.path, name))
    where = httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=target)  # parsed once, by us
    headers = [("Host", url.authority), ("User-Agent", "onebase"), ("Accept-Encoding", "identity")]
    with pool.stream("GET", where, headers=headers) as response:
        if name in OPTIONAL_FILES and 300 <= response.status < 500:
            return
        check_status(response.status, name)
        answered = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in response.headers}
        length = content_length(name, answered)
        if length is None:  # endless bodies, and chunks of a few bytes that cost more than they bring
            raise SourceFailed(f"{name}: the source does not say how long it is (no Content-Length).", param="source")
        intake.write(name, response.iter_stream(), length)
