"""https sources against servers on 127.0.0.1: what is fetched, and what a hostile one gets."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.check import TOKENIZER_FILES
from onebase.adapters.errors import AdapterError, AdapterNotFound, AdapterRejected, AdapterTooLarge, SourceFailed
from onebase.adapters.sources import SourceOptions, Sources
from onebase.adapters.sources.location import Url
from onebase.adapters.sources.web import WebSource

from .conftest import CONFIG, MAX_BYTES, QUICK, TENSORS, Answer, Fetcher, Remote, adapter_files, send


@pytest.fixture
def sources(remote: Remote) -> Sources:
    return Sources(SourceOptions(allow_url=(f"{remote.url}/team",)), limits=QUICK)


def test_a_folder_is_its_config_and_its_tensors(remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    remote.serve("/team/a", adapter_files())
    fetched, files = fetch(sources, f"{remote.url}/team/a/")
    assert files == adapter_files()
    assert (fetched.source, fetched.revision) == (f"{remote.url}/team/a/", None)
    assert remote.paths() == [f"/team/a/{name}" for name in (CONFIG, TENSORS, *TOKENIZER_FILES)]
    assert remote.asked[0][1]["Host"] == f"127.0.0.1:{remote.port}"


def test_a_tokenizer_comes_along_where_there_is_one(remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    brought = {"tokenizer_config.json": b"{}", "chat_template.jinja": b"x"}
    remote.serve("/team/a", adapter_files() | brought)
    remote.answers["/team/a/tokenizer.json"] = send(b"", 403)  # as object stores answer for what is not there
    _, files = fetch(sources, f"{remote.url}/team/a")
    assert files == adapter_files() | brought


def test_a_source_that_fails_is_not_one_without_a_tokenizer(remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    remote.serve("/team/a", adapter_files())
    remote.answers["/team/a/tokenizer.json"] = send(b"", 500)
    with pytest.raises(SourceFailed, match=r"tokenizer\.json"):
        fetch(sources, f"{remote.url}/team/a")
    assert fetch.left_behind() == []


def test_nothing_else_is_asked_for(remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    elsewhere = (
        f"{remote.url}/other/a",
        f"{remote.url}/teammate/a",
        f"{remote.url}/team/../a",
        f"{remote.url}/team/%2e%2e/a",
        f"http://localhost:{remote.port}/team/a",
        f"http://127.1:{remote.port}/team/a",
        f"http://2130706433:{remote.port}/team/a",
        f"https://127.0.0.1:{remote.port}/team/a",
        f"http://[::ffff:127.0.0.1]:{remote.port}/team/a",
        f"http://x@127.0.0.1:{remote.port}/team/a",
    )
    for source in elsewhere:
        with pytest.raises(AdapterRejected) as refusal:
            fetch(sources, source)
        assert refusal.value.param == "source"
    assert remote.asked == []


def test_off_by_default(remote: Remote, fetch: Fetcher) -> None:
    with pytest.raises(AdapterRejected, match="--allow-url"):
        fetch(Sources(SourceOptions()), f"{remote.url}/team/a")


def test_proxies_of_the_environment_are_not_used(
    remote: Remote, sources: Sources, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    remote.serve("/team/a", adapter_files())
    assert fetch(sources, f"{remote.url}/team/a")[1] == adapter_files()


def test_a_name_that_resolves_to_this_machine_is_refused(remote: Remote, fetch: Fetcher) -> None:
    web = WebSource((Url.parse("https://example.com/team"),), look_up=lambda host, port: ["127.0.0.1"])
    with pytest.raises(AdapterRejected, match="public internet"):
        fetch(Sources(SourceOptions(), limits=QUICK, kinds={"https": web}), "https://example.com/team/a")


def test_the_connection_goes_to_the_address_that_was_checked(
    remote: Remote, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebinding name has no second chance: it is looked up once by us, and never by the library."""
    answers = iter([["127.0.0.1"]])
    real = socket.getaddrinfo

    def literal_only(host: str, *args: Any, **options: Any) -> Any:
        assert ipaddress.ip_address(host)
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", literal_only)
    remote.serve("/team/a", adapter_files())
    allowed = (Url.parse(f"http://localhost:{remote.port}/team"),)
    web = WebSource(allowed, look_up=lambda host, port: next(answers))
    sources = Sources(SourceOptions(), limits=QUICK, kinds={"http": web})
    assert fetch(sources, f"http://localhost:{remote.port}/team/a")[1] == adapter_files()
    assert {headers["Host"] for _, headers in remote.asked} == {f"localhost:{remote.port}"}


def test_the_next_address_is_tried(remote: Remote, fetch: Fetcher) -> None:
    remote.serve("/team/a", adapter_files())
    allowed = (Url.parse(f"http://localhost:{remote.port}/team"),)
    web = WebSource(allowed, look_up=lambda host, port: ["::1", "127.0.0.2", "127.0.0.1"])
    sources = Sources(SourceOptions(), limits=QUICK, kinds={"http": web})
    assert fetch(sources, f"http://localhost:{remote.port}/team/a")[1] == adapter_files()


def _raw(head: str, body: bytes = b"") -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head.replace("\n", "\r\n").encode() + body)
        handler.close_connection = True

    return answer


def _endless(head: str, piece: bytes, pause: float = 0.0) -> Answer:
    """Sends until the client hangs up."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head.replace("\n", "\r\n").encode())
        while True:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)

    return answer


def _silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


SLOW = "too slow|ReadTimeout"  # whichever of the two clocks ends first
HOSTILE: dict[str, tuple[Answer, type[AdapterError], str]] = {
    "redirect inside": (
        send(b"", 302, Location="http://169.254.169.254/latest/meta-data"),
        AdapterRejected,
        "redirects are not followed",
    ),
    "permanent redirect": (send(b"", 308, Location="/team/b"), AdapterRejected, "redirects are not followed"),
    "unauthorised": (send(b"", 401), AdapterRejected, "refuses access"),
    "forbidden": (send(b"", 403), AdapterRejected, "refuses access"),
    "missing": (send(b"", 404), AdapterNotFound, "no such thing"),
    "broken": (send(b"secret", 500), SourceFailed, "answered 500"),
    "partial": (send(b"{}", 206), SourceFailed, "answered 206"),
    "no content": (_raw("HTTP/1.1 204 No Content\n\n"), SourceFailed, "answered 204"),
    "endless body": (_endless("HTTP/1.1 200 OK\n\n", b"x" * 65536), SourceFailed, "does not say how long"),
    "endless chunks": (
        _endless("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n", b"4\r\nabcd\r\n" * 4096),
        SourceFailed,
        "does not say how long",
    ),
    "terabyte": (_endless(f"HTTP/1.1 200 OK\nContent-Length: {1 << 40}\n\n", b"x" * 65536), AdapterTooLarge, "over"),
    "endless head": (_endless("HTTP/1.1 200 OK\n", b"X-A: " + b"a" * 4096 + b"\r\n"), SourceFailed, "cannot be read"),
    "endless continues": (_endless("", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05), SourceFailed, SLOW),
    "length too long": (send(b"{}", Content_Length="10000"), SourceFailed, "cannot be read"),
    "length negative": (send(b"{}", Content_Length="-1"), SourceFailed, "cannot be read"),
    "two lengths": (
        _raw("HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 3\n\n", b"{}"),
        SourceFailed,
        "cannot be read",
    ),
    "compressed": (send(b"{}", Content_Encoding="gzip"), SourceFailed, "compressed"),
    "dripping body": (_endless("HTTP/1.1 200 OK\nContent-Length: 99\n\n", b" ", 0.1), SourceFailed, SLOW),
    "dripping head": (_endless("HTTP/1.1 200 OK\nX-A: ", b"a", 0.1), SourceFailed, SLOW),
    "silence": (_silent, SourceFailed, "cannot be read"),
    "not HTTP": (_raw("SSH-2.0-OpenSSH\n"), SourceFailed, "cannot be read"),
    "hang up": (_raw(""), SourceFailed, "cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_answers(case: str, remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    """Each ends with its error in bounded time, and leaves nothing behind. Half of them at the second file."""
    answer, kind, message = HOSTILE[case]
    for victim in (CONFIG, TENSORS):
        remote.serve("/team/a", adapter_files())
        remote.answers[f"/team/a/{victim}"] = answer
        start = time.monotonic()
        with pytest.raises(kind, match=message) as failure:
            fetch(sources, f"{remote.url}/team/a")
        assert time.monotonic() - start < 4 * QUICK.grace
        assert failure.value.param in {"source", "files"}
        assert "secret" not in failure.value.message
        assert fetch.left_behind() == []
    assert not any("meta-data" in path or "/b/" in path for path in remote.paths())


def test_a_short_length_is_a_broken_file(remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    files = adapter_files()
    remote.serve("/team/a", files)
    remote.answers[f"/team/a/{TENSORS}"] = send(files[TENSORS], Content_Length=str(len(files[TENSORS]) - 8))
    with pytest.raises((AdapterRejected, SourceFailed)):  # what is left over may break the next answer, too
        fetch(sources, f"{remote.url}/team/a")


def test_a_pickle_in_place_of_tensors_is_never_asked_for(remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    remote.serve("/team/a", {CONFIG: adapter_files()[CONFIG], "adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterNotFound, match=TENSORS):
        fetch(sources, f"{remote.url}/team/a")
    assert not any(path.endswith(".bin") for path in remote.paths())


def test_a_server_that_is_not_there(remote: Remote, fetch: Fetcher) -> None:
    sources = Sources(SourceOptions(allow_url=("http://127.0.0.1:9/team",)), limits=QUICK)
    with pytest.raises(SourceFailed, match="cannot be read"):
        fetch(sources, "http://127.0.0.1:9/team/a")


def test_closing_ends_what_is_under_way(remote: Remote, fetch: Fetcher) -> None:
    sources = Sources(SourceOptions(allow_url=(f"{remote.url}/team",)))
    remote.answers[f"/team/a/{CONFIG}"] = _endless("HTTP/1.1 200 OK\nContent-Length: 9999\n\n", b" ", 0.02)
    threading.Timer(0.2, sources.close).start()
    start = time.monotonic()
    with pytest.raises(SourceFailed, match="stopping"):
        fetch(sources, f"{remote.url}/team/a")
    assert time.monotonic() - start < 5


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a self-signed certificate for example.com, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate, both = folder / "key.pem", folder / "cert.pem", folder / "both.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=example.com"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:example.com"], check=True, capture_output=True)
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


@pytest.fixture
def secure(remote: Remote, certificate: Path) -> Iterator[Remote]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    remote.secure(context)
    return remote


def test_the_certificate_is_the_hosts_though_the_address_is_pinned(
    secure: Remote, certificate: Path, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.1 counts as public here, since a test has no other machine to connect to."""
    monkeypatch.setattr("onebase.adapters.sources.addresses.is_public", lambda address: True)
    secure.serve("/team/a", adapter_files())
    trusting = ssl.create_default_context(cafile=certificate)
    for host, context in (("example.com", trusting), ("example.org", trusting), ("example.com", None)):
        web = WebSource((Url.parse(f"https://{host}:{secure.port}"),), lambda host, port: ["127.0.0.1"], context)
        sources = Sources(SourceOptions(), limits=QUICK, kinds={"https": web})
        source = f"https://{host}:{secure.port}/team/a"
        if host == "example.com" and context is trusting:
            assert fetch(sources, source)[1] == adapter_files()
            continue
        with pytest.raises(SourceFailed, match="ConnectError"):
            fetch(sources, source)
    assert len(secure.asked) == 2 + len(TOKENIZER_FILES)


def test_the_size_limit_is_the_stages(remote: Remote, sources: Sources, fetch: Fetcher) -> None:
    remote.serve("/team/a", adapter_files())
    remote.answers[f"/team/a/{TENSORS}"] = send(b"x" * (MAX_BYTES + 1))
    with pytest.raises(AdapterTooLarge):
        fetch(sources, f"{remote.url}/team/a")
