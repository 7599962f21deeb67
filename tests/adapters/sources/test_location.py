from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import httpcore2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.adapters.sources import SourceOptions
from onebase.adapters.sources.location import Bucket, LocationError, Repo, Url, shown


@pytest.mark.parametrize(
    ("text", "host", "port", "path"),
    [
        ("https://Example.COM/a/b/", "example.com", 443, ("a", "b")),
        ("https://example.com", "example.com", 443, ()),
        ("https://example.com:8443/a..b/@1", "example.com", 8443, ("a..b", "@1")),
        ("https://[2001:DB8:0::1]/a", "2001:db8::1", 443, ("a",)),
        ("http://127.0.0.1:80", "127.0.0.1", 80, ()),
    ],
)
def test_addresses(text: str, host: str, port: int, path: tuple[str, ...]) -> None:
    url = Url.parse(text)
    assert (url.host, url.port, url.path) == (host, port, path)


@pytest.mark.parametrize(
    "text",
    [
        "ftp://example.com/a",
        "https:/example.com",
        "https://",
        "https:///a",
        "https://user:secret@example.com/a",
        "https://example.com@evil.test/a",
        "https://example.com\\@evil.test/a",
        "https://example.com/a?token=secret",
        "https://example.com/a#secret",
        "https://example.com/a/../b",
        "https://example.com/a/./b",
        "https://example.com/a/...",
        "https://example.com//a",
        "https://example.com/a//",
        "https://example.com/%2e%2e/b",
        "https://example.com/a%2fb",
        "https://example.com/a%00",
        "https://example.com/a;b",
        "https://example.com/a b",
        "https://example.com/a\r\nHost: evil.test",
        "https://example.com:0/a",
        "https://example.com:/a",
        "https://example.com:65536/a",
        "https://example.com:80:80/a",
        "https://example.com:+80/a",
        "https://example.com./a",
        "https://-example.com/a",
        "https://exämple.com/a",
        "https://example。com/a",
        "https://2130706433/a",
        "https://0x7f000001/a",
        "https://0x7f.1/a",
        "https://127.1/a",
        "https://0177.0.0.1/a",
        "https://127.0.0.01/a",
        "https://127.0.0.1./a",
        "https://[127.0.0.1]/a",
        "https://[::1/a",
        "https://::1]/a",
        "https://[::1]x/a",
        "https://[fe80::1%25eth0]/a",
        "https://[fe80::1%eth0]/a",
        "https://" + "a" * 1100,
    ],
)
def test_what_would_have_to_be_repaired_is_no_address(text: str) -> None:
    with pytest.raises(LocationError) as refusal:
        Url.parse(text)
    assert "secret" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


_WHOLE = ["..", "//", ":443", ":8443", "%2e", "%2f", "0x7f.1", "user:pw@", "example.com", "[::1]"]
_PIECES = st.sampled_from([*_WHOLE, *"aB01./@:?#\\[]% \t\n\0ä。-_~;&"])
_HOSTS = st.sampled_from(["", "example.com", "EXAMPLE.com:8443", "10.0.0.1/", "[2001:DB8::1]/a", "localhost/a/b"])


@settings(max_examples=500, deadline=None)
@given(_HOSTS, st.lists(_PIECES, max_size=6).map("".join))
def test_other_parsers_read_the_same_place(host: str, rest: str) -> None:
    """What passes means one thing to us, to urllib and to the library that connects."""
    text = f"https://{host}{rest}"
    try:
        url = Url.parse(text)
    except LocationError:
        return
    split, theirs = urlsplit(text), httpcore2.URL(text)
    connected = theirs.host.decode().strip("[]").lower()
    assert connected == split.hostname
    assert url.host == connected or ipaddress.ip_address(url.host) == ipaddress.ip_address(connected)
    assert url.port == (split.port or 443) == (theirs.port or 443)
    assert split.path.strip("/") == theirs.target.decode().strip("/") == "/".join(url.path)
    assert (split.query, split.fragment, split.username) == ("", "", None)


def test_below_is_by_whole_segments_and_by_origin() -> None:
    allowed = Url.parse("https://example.com/team")
    assert Url.parse("https://example.com/team/a").is_below(allowed)
    assert Url.parse("https://EXAMPLE.com:443/team/").is_below(allowed)
    for other in (
        "https://example.com/teammate/a",
        "https://example.com/",
        "https://example.com/Team/a",
        "http://example.com/team/a",
        "https://example.com:444/team/a",
        "https://example.com.evil.test/team/a",
        "https://sub.example.com/team/a",
    ):
        assert not Url.parse(other).is_below(allowed)


def test_buckets() -> None:
    allowed = Bucket.parse("s3://bucket/team/")
    assert allowed.prefix == "team"
    assert Bucket.parse("s3://bucket/team/a").is_below(allowed)
    for other in ("s3://bucket/teammate", "s3://bucket", "s3://bucket2/team/a", "gs://bucket/team/a"):
        assert not Bucket.parse(other).is_below(allowed)
    for text in (
        "s3://",
        "s3:///a",
        "s3://Bucket/a",
        "s3://b@cket/a",
        "s3://bucket/../b",
        "s3://bucket//a",
        "file:///a",
    ):
        with pytest.raises(LocationError):
            Bucket.parse(text)


def test_repositories() -> None:
    assert Repo.parse("hf://org/name") == Repo("org", "name", None, "")
    assert Repo.parse("hf://org/name@v1.0/a/b/") == Repo("org", "name", "v1.0", "a/b")
    for text in (
        "org/name",
        "hf://org",
        "hf://org/",
        "hf:///name",
        "hf://../name",
        "hf://org/..",
        "hf://org/na--me",
        "hf://org/name@",
        "hf://org/name@../x",
        "hf://org/name/../x",
        "hf://org/name?x",
        "https://org/name",
    ):
        with pytest.raises(LocationError):
            Repo.parse(text)


def test_messages_repeat_no_secrets() -> None:
    assert shown("https://user:secret@example.com/a?token=secret#secret") == "'https://example.com/a'"
    assert shown("//user:secret@example.com/a") == "'//example.com/a'"
    assert shown("s3:bucket?signature=secret") == "'s3:bucket'"
    assert shown("/a/b@c//d") == "'/a/b@c//d'"
    assert shown("hf://org/name@v1/a") == "'hf://org/name@v1/a'"
    assert len(shown("https://" + "a" * 5000)) < 300


@pytest.mark.parametrize(
    ("option", "entry"),
    [
        ("allow_hub", "org/name/x"),
        ("allow_hub", ""),
        ("allow_hub", "hf://org"),
        ("allow_bucket", "bucket"),
        ("allow_bucket", "https://bucket/a"),
        ("allow_url", "http://example.com/a"),
        ("allow_url", "http://10.0.0.1/a"),
        ("allow_url", "https://example.com/../a"),
        ("allow_url", "*"),
    ],
)
def test_options_that_allow_nothing_are_refused_by_name(option: str, entry: str) -> None:
    with pytest.raises(ValueError, match="--" + option.replace("_", "-")):
        SourceOptions(**{option: (entry,)})


@pytest.mark.parametrize("template", ["/adapters", "/{name}/{name}", "/{name}{x}", "{}", ""])
def test_a_resolver_has_one_name(template: str) -> None:
    with pytest.raises(ValueError, match="--resolver"):
        SourceOptions(resolver=template)
