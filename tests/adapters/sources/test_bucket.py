"""Object stores: the logic over obstore's store in memory, and rounds against a fake S3 on 127.0.0.1."""

from __future__ import annotations

import hashlib
import re
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest
from obstore.store import MemoryStore

from onebase.adapters.errors import AdapterError, AdapterNotFound, AdapterRejected, AdapterTooLarge, SourceFailed
from onebase.adapters.sources import SourceOptions, Sources, bucket
from onebase.adapters.sources.bucket import BucketSource
from onebase.adapters.sources.location import Bucket

from .conftest import MAX_BYTES, QUICK, TENSORS, Answer, Fetcher, Remote, adapter_files, send


@pytest.fixture
def memory() -> MemoryStore:
    store = MemoryStore()
    for name, body in (adapter_files() | {"README.md": b"# hi", "deep/adapter_model.safetensors": b"x"}).items():
        store.put(f"team/a/{name}", body)
    store.put("team/ab/other.safetensors", b"x")
    return store


def over(store: MemoryStore) -> Sources:
    kind = BucketSource((Bucket.parse("s3://bucket/team"),), open_store=lambda where, limits: store)
    return Sources(SourceOptions(), limits=QUICK, kinds={"s3": kind})


def test_a_folder_of_a_bucket(memory: MemoryStore, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "RANGE_BYTES", 10)  # several ranges
    fetched, files = fetch(over(memory), "s3://bucket/team/a/")
    assert files == adapter_files()
    assert fetched.source == "s3://bucket/team/a/"
    assert fetched.revision is not None
    assert re.fullmatch("[0-9a-f]{64}", fetched.revision)


def test_the_revision_says_whether_the_objects_are_the_same(memory: MemoryStore, fetch: Fetcher) -> None:
    sources = over(memory)
    first = fetch(sources, "s3://bucket/team/a")[0].revision
    memory.put("team/a/README.md", b"another text")
    assert fetch(sources, "s3://bucket/team/a", first)[0].revision == first
    memory.put(f"team/a/{TENSORS}", adapter_files(2.0)[TENSORS])
    with pytest.raises(AdapterNotFound, match="have changed") as refusal:
        fetch(sources, "s3://bucket/team/a", first)
    assert refusal.value.param == "revision"
    assert fetch(sources, "s3://bucket/team/a")[0].revision != first


def test_an_object_that_changes_while_it_is_read(
    memory: MemoryStore, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "RANGE_BYTES", 10)

    class Changing:
        def list(self, *args: object, **options: object) -> object:
            return memory.list(*args, **options)  # type: ignore[call-overload]

        def get(self, path: str, **options: object) -> object:
            got = memory.get(path, **options)  # type: ignore[arg-type]
            memory.put(path, b"x" * 100)
            return got

    with pytest.raises(SourceFailed, match="changed while it was read"):
        fetch(over(Changing()), "s3://bucket/team/a")  # type: ignore[arg-type]
    assert fetch.left_behind() == []


def test_what_is_not_there(memory: MemoryStore, fetch: Fetcher) -> None:
    with pytest.raises(AdapterNotFound, match="no objects"):
        fetch(over(memory), "s3://bucket/team/b")
    memory.delete(f"team/a/{TENSORS}")
    memory.put("team/a/adapter_model.bin", b"pickle")
    with pytest.raises(AdapterRejected, match="onebase adapters convert"):
        fetch(over(memory), "s3://bucket/team/a")


def test_what_is_too_much(memory: MemoryStore, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "MAX_LISTED", 3)
    with pytest.raises(AdapterRejected, match="over 3 objects"):
        fetch(over(memory), "s3://bucket/team/a")
    monkeypatch.setattr(bucket, "MAX_LISTED", 1000)
    memory.put(f"team/a/{TENSORS}", b"x" * (MAX_BYTES + 1))
    with pytest.raises(AdapterTooLarge):
        fetch(over(memory), "s3://bucket/team/a")


def test_the_allow_list(memory: MemoryStore, fetch: Fetcher) -> None:
    for source in ("s3://bucket/teammate/a", "s3://bucket", "s3://other/team/a", "s3://bucket/team/../x"):
        with pytest.raises(AdapterRejected):
            fetch(over(memory), source)
    with pytest.raises(AdapterRejected, match="--allow-bucket turns it on"):
        Sources(SourceOptions()).check("gs://bucket/team/a")


def _listing(objects: dict[str, bytes], prefix: str) -> bytes:
    entries = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"{hashlib.md5(body).hexdigest()}"</ETag><Size>{len(body)}</Size></Contents>'
        for key, body in objects.items()
        if key.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


class FakeS3:
    """GET of objects with Range and If-Match, and ListObjectsV2, for one bucket."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.objects: dict[str, bytes] = {}
        remote.answers["/bucket"] = self._list

    def put(self, key: str, body: bytes) -> None:
        self.objects[key] = body
        self.remote.answers[f"/bucket/{key}"] = lambda handler: self._get(handler, body)

    def _list(self, handler: BaseHTTPRequestHandler) -> None:
        query = parse_qs(urlsplit(handler.path).query)
        assert query["list-type"] == ["2"]
        send(_listing(self.objects, query["prefix"][0]), Content_Type="application/xml")(handler)

    def _get(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        if handler.headers["If-Match"] != etag:
            send(b"", 412)(handler)
            return
        length = f"bytes {start}-{end}/{len(body)}"
        modified = "Thu, 01 Jan 2026 00:00:00 GMT"
        send(body[start : end + 1], 206, ETag=etag, Content_Range=length, Last_Modified=modified)(handler)


@pytest.fixture
def s3(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    for name, value in {
        "AWS_ENDPOINT_URL": remote.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "eu-test-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "topsecret",
    }.items():
        monkeypatch.setenv(name, value)
    made = FakeS3(remote)
    for name, body in adapter_files().items():
        made.put(f"team/a/{name}", body)
    return made


@pytest.fixture
def sources() -> Sources:
    return Sources(SourceOptions(allow_bucket=("s3://bucket/team",)), limits=QUICK)


def test_a_round_over_http(s3: FakeS3, sources: Sources, fetch: Fetcher) -> None:
    """Credentials and endpoint come from the environment, and requests are signed with them."""
    fetched, files = fetch(sources, "s3://bucket/team/a")
    assert files == adapter_files()
    assert all("Credential=key/" in headers["authorization"] for _, headers in s3.remote.asked)
    s3.put(f"team/a/{TENSORS}", adapter_files(2.0)[TENSORS])
    assert fetch(sources, "s3://bucket/team/a")[0].revision != fetched.revision


def _drip(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.1)


FAILURES: dict[str, tuple[Answer, type[AdapterError], str]] = {
    "missing": (send(b"<Error><Code>NoSuchBucket</Code></Error>", 404), AdapterNotFound, "not there|no such thing"),
    "unsigned": (send(b"<Error><Code>AccessDenied</Code></Error>", 401), AdapterRejected, "refuses access"),
    "forbidden": (send(b"<Error><Code>AccessDenied</Code></Error>", 403), AdapterRejected, "refuses access"),
    "down": (send(b"topsecret", 500), SourceFailed, "answered 500"),
    "limited": (send(b"", 429), SourceFailed, "answered 429|store failed"),
    "no answer to this": (send(b"<html>"), SourceFailed, "store failed"),
    "drip": (_drip, SourceFailed, "store failed"),
}


@pytest.mark.parametrize("where", ["/bucket", f"/bucket/team/a/{TENSORS}"])
@pytest.mark.parametrize("case", FAILURES)
def test_failures_end_in_bounded_time(case: str, where: str, s3: FakeS3, sources: Sources, fetch: Fetcher) -> None:
    answer, kind, message = FAILURES[case]
    s3.remote.answers[where] = answer
    start = time.monotonic()
    with pytest.raises(kind, match=message) as failure:
        fetch(sources, "s3://bucket/team/a")
    assert time.monotonic() - start < 8 * QUICK.grace
    assert "secret" not in failure.value.message
    assert fetch.left_behind() == []


def test_a_bucket_whose_environment_is_not_set(monkeypatch: pytest.MonkeyPatch, fetch: Fetcher) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    sources = Sources(SourceOptions(allow_bucket=("az://container",)), limits=QUICK)
    with pytest.raises(SourceFailed, match="environment"):
        fetch(sources, "az://container/a")
