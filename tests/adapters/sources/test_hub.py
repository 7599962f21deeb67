"""The Hub source against a fake Hub on 127.0.0.1, through huggingface_hub itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from huggingface_hub import close_session, constants

from onebase.adapters.errors import AdapterError, AdapterNotFound, AdapterRejected, AdapterTooLarge, SourceFailed
from onebase.adapters.sources import SourceOptions, Sources
from onebase.adapters.sources.hub import HubSource

from .conftest import CONFIG, MAX_BYTES, QUICK, TENSORS, Answer, Fetcher, Remote, adapter_files, send

OLD, NEW = "a" * 40, "b" * 40
EXTRA = {"README.md": b"# hi", "training_args.bin": b"pickle", "checkpoint-1/adapter_model.safetensors": b"x"}


class Hub:
    """Repositories by id -> commit -> files, and branches by (id, name)."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def add(self, repo: str, commit: str, files: dict[str, bytes], *branches: str) -> None:
        self.remote.serve(f"/{repo}/resolve/{commit}", files)
        for branch in branches:
            self.point(repo, branch, commit, files)

    def point(self, repo: str, branch: str, commit: str, files: dict[str, bytes]) -> None:
        self.remote.answers[_info_path(repo, branch)] = send(_info(repo, commit, files))


def _info_path(repo: str, branch: str) -> str:
    return f"/api/models/{repo}" + ("" if branch == "main" else f"/revision/{branch}")


def _info(repo: str, commit: str | None, files: dict[str, bytes]) -> bytes:
    return json.dumps({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}).encode()


@pytest.fixture
def hub(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield Hub(remote)
    close_session()


@pytest.fixture
def sources(remote: Remote) -> Sources:
    return _sources(remote, "*")


def _sources(remote: Remote, *allowed: str) -> Sources:
    kinds = {"hf": HubSource(allowed, endpoint=remote.url)}
    return Sources(SourceOptions(allow_hub=allowed), limits=QUICK, kinds=kinds)


def test_a_repository_at_its_commit(hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    hub.add("org/name", OLD, adapter_files() | EXTRA, "main", "v1")
    for source, revision in (("hf://org/name", None), ("hf://org/name@v1", None), ("hf://org/name", "v1")):
        fetched, files = fetch(sources, source, revision)
        assert files == adapter_files()
        assert (fetched.source, fetched.revision) == (source, OLD)
    asked = [path for path in hub.remote.paths() if "/resolve/" in path]
    assert set(asked) == {f"/org/name/resolve/{OLD}/{name}" for name in (CONFIG, TENSORS)}


def test_a_subfolder(hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    files = {f"team/a/{name}": body for name, body in adapter_files().items()}
    hub.add("org/name", OLD, files | {"team/ab/x.safetensors": b"x", "x.safetensors": b"x"}, "main")
    assert fetch(sources, "hf://org/name/team/a")[1] == adapter_files()
    with pytest.raises(AdapterNotFound, match="no folder team/b"):
        fetch(sources, "hf://org/name/team/b")


def test_a_branch_that_moves_meanwhile_does_not_mix_commits(hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    hub.add("org/name", OLD, adapter_files(1.0), "main")
    hub.add("org/name", NEW, adapter_files(2.0))
    config = f"/org/name/resolve/{OLD}/{CONFIG}"
    first = hub.remote.answers[config]

    def moves(handler: BaseHTTPRequestHandler) -> None:
        hub.point("org/name", "main", NEW, adapter_files(2.0))
        first(handler)

    hub.remote.answers[config] = moves
    fetched, files = fetch(sources, "hf://org/name")
    assert (fetched.revision, files) == (OLD, adapter_files(1.0))
    fetched, files = fetch(sources, "hf://org/name")
    assert (fetched.revision, files) == (NEW, adapter_files(2.0))


def test_the_token_goes_to_the_hub_and_not_to_its_file_servers(hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    """localhost is another origin than 127.0.0.1."""
    hub.add("org/name", OLD, adapter_files(), "main")
    hub.remote.serve("/cdn", adapter_files())
    cdn = f"http://localhost:{hub.remote.port}/cdn/{TENSORS}?signature=secret"
    hub.remote.answers[f"/org/name/resolve/{OLD}/{TENSORS}"] = send(b"", 302, Location=cdn)
    assert fetch(sources, "hf://org/name")[1] == adapter_files()
    tokens = {path: headers.get("authorization") for path, headers in hub.remote.asked}
    assert tokens.pop(f"/cdn/{TENSORS}?signature=secret") is None
    assert set(tokens.values()) == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("allowed", "served"),
    [(("*",), True), (("org",), True), (("org/name",), True), (("org/other", "or", "organ", "org/nam"), False)],
)
def test_the_allow_list(allowed: tuple[str, ...], served: bool, hub: Hub, fetch: Fetcher) -> None:
    hub.add("org/name", OLD, adapter_files(), "main")
    if served:
        assert fetch(_sources(hub.remote, *allowed), "hf://org/name")
        return
    with pytest.raises(AdapterRejected, match="--allow-hub"):
        fetch(_sources(hub.remote, *allowed), "hf://org/name")
    assert hub.remote.asked == []


def test_off_by_default() -> None:
    with pytest.raises(AdapterRejected, match="--allow-hub turns it on"):
        Sources(SourceOptions()).check("hf://org/name")


def test_a_bare_repository_name_is_ambiguous(sources: Sources) -> None:
    for source in ("org/name", "hf:org/name", "HF://org/name"):
        with pytest.raises(AdapterRejected, match="hf://org/name"):
            Sources(SourceOptions(allow_hub=("*",))).check(source)
    with pytest.raises(AdapterRejected, match="another one"):
        sources.check("hf://org/name@v1", "v2")
    with pytest.raises(AdapterRejected, match="not a branch"):
        sources.check("hf://org/name", "../v2")


def test_offline(hub: Hub, sources: Sources, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceFailed, match="HF_HUB_OFFLINE"):
        fetch(sources, "hf://org/name")


def _drip(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.1)


def _silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.2)
    handler.close_connection = True


_NAMELESS = send(b"", 404, X_Error_Code="RepoNotFound")
_COMMITLESS = send(_info("org/name", None, adapter_files()))
INFO_FAILURES: dict[str, tuple[Answer, type[AdapterError], str]] = {
    "no repository": (_NAMELESS, AdapterNotFound, "no repository org/name"),
    "private": (send(b"", 401, X_Error_Code="RepoNotFound"), AdapterNotFound, "private"),
    "no revision": (send(b"", 404, X_Error_Code="RevisionNotFound"), AdapterNotFound, "no such revision"),
    "gated": (send(b"", 403, X_Error_Code="GatedRepo"), AdapterRejected, "gated"),
    "forbidden": (send(b"", 403), AdapterRejected, "refuses access"),
    "down": (send(b"hf_secret", 500), SourceFailed, "answered 500"),
    "limited": (send(b"", 429), SourceFailed, "answered 429"),
    "not JSON": (send(b"<html>"), SourceFailed, "not understood"),
    "odd JSON": (send(b"[1]"), SourceFailed, "not understood"),
    "odd siblings": (send(b'{"id": "org/name", "siblings": [1]}'), SourceFailed, "not understood"),
    "no commit": (_COMMITLESS, SourceFailed, "named no commit"),
    "silence": (_silent, SourceFailed, "cannot be reached"),
}


@pytest.mark.parametrize("case", INFO_FAILURES)
def test_what_the_hub_may_say_of_a_repository(case: str, hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    answer, kind, message = INFO_FAILURES[case]
    hub.remote.answers[_info_path("org/name", "main")] = answer
    _refused(kind, message, sources, fetch)


FILE_FAILURES: dict[str, tuple[Answer, type[AdapterError], str]] = {
    "gone": (send(b"", 404), AdapterNotFound, "no such thing"),
    "forbidden": (send(b"", 403), AdapterRejected, "refuses access"),
    "down": (send(b"", 503), SourceFailed, "answered 503"),
    "short": (send(b"{}", Content_Length="10000"), SourceFailed, "cannot be reached"),
    "compressed": (send(b"{}", Content_Encoding="gzip"), SourceFailed, "compressed"),
    "drip": (_drip, SourceFailed, "too slow|cannot be reached: ReadTimeout"),
    "silence": (_silent, SourceFailed, "cannot be reached"),
    "loop": (send(b"", 302, Location=f"/org/name/resolve/{OLD}/{TENSORS}"), SourceFailed, "cannot be reached"),
    "redirect to nowhere": (send(b"", 302, Location="ftp://127.0.0.1/x"), SourceFailed, "cannot be reached"),
    "too large": (send(b"x" * (MAX_BYTES + 1)), AdapterTooLarge, "over"),
}


@pytest.mark.parametrize("case", FILE_FAILURES)
def test_what_may_happen_to_a_file(case: str, hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    answer, kind, message = FILE_FAILURES[case]
    hub.add("org/name", OLD, adapter_files(), "main")
    hub.remote.answers[f"/org/name/resolve/{OLD}/{TENSORS}"] = answer
    _refused(kind, message, sources, fetch)


LISTINGS: dict[str, tuple[dict[str, bytes], str]] = {
    "no config": ({TENSORS: b""}, "no adapter_config.json"),
    "no tensors": ({CONFIG: b""}, "no adapter_model.safetensors"),
    "a pickle": ({CONFIG: b"", "adapter_model.bin": b""}, "onebase adapters convert"),
    "fusion": (adapter_files() | {"adapter_fusion_config.json": b""}, "AdapterFusion"),
    "traversal": (adapter_files() | {"..\\x.safetensors": b""}, "not a file of an adapter"),
    "newline": (adapter_files() | {"x\n.safetensors": b""}, "not a file of an adapter"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_listings_that_are_refused(case: str, hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    files, message = LISTINGS[case]
    hub.add("org/name", OLD, files, "main")
    _refused(AdapterRejected, message, sources, fetch)
    assert not any("/resolve/" in path for path in hub.remote.paths())


def test_names_that_climb_are_never_asked_for(hub: Hub, sources: Sources, fetch: Fetcher) -> None:
    odd = ("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors")
    hub.add("org/name", OLD, adapter_files() | dict.fromkeys(odd, b""), "main")
    assert fetch(sources, "hf://org/name")[1] == adapter_files()


def _refused(kind: type[AdapterError], message: str, sources: Sources, fetch: Fetcher) -> None:
    start = time.monotonic()
    with pytest.raises(kind, match=message) as failure:
        fetch(sources, "hf://org/name")
    assert type(failure.value) is kind
    assert "secret" not in failure.value.message
    assert time.monotonic() - start < 4 * QUICK.grace
    assert fetch.left_behind() == []
