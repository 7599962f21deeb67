from __future__ import annotations

from pathlib import Path

import pytest

from onebase.adapters.errors import AdapterNotFound, AdapterRejected
from onebase.adapters.sources import SourceOptions, Sources, allowed_folder

from .conftest import Fetcher, adapter_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "allowed" / "a").mkdir(parents=True)
    (tmp_path / "allowed_not").mkdir()
    return tmp_path / "allowed"


def test_folders_below_a_root(root: Path, tmp_path: Path) -> None:
    assert allowed_folder(str(root / "a"), [tmp_path / "none", root]) == root / "a"
    (root / "inner").symlink_to(root / "a")
    assert allowed_folder(str(root / "inner"), [root]) == root / "a"


def test_everything_else_is_refused_alike(root: Path, tmp_path: Path) -> None:
    (root / "escape").symlink_to(tmp_path / "allowed_not")
    sources = [str(root / ".." / "allowed_not"), str(root / "escape"), str(root) + "_not", "/etc", "/missing", "a", ""]
    for source in [*sources, "\0", str(root / ("x" * 5000)) + "/../../../..", "a" * 5000, "~"]:
        with pytest.raises(AdapterRejected, match="not an absolute path below") as refusal:
            allowed_folder(source, [root])
        assert len(refusal.value.message) < 400


def test_off_by_default(root: Path) -> None:
    with pytest.raises(AdapterRejected, match="--allow-path"):
        allowed_folder(str(root), [])


def test_files_are_no_folders(root: Path) -> None:
    (root / "file").write_text("")
    with pytest.raises(AdapterNotFound, match="not a folder"):
        allowed_folder(str(root / "file"), [root])


def test_a_folder_is_fetched_whole(root: Path, fetch: Fetcher) -> None:
    for name, body in (adapter_files() | {"README.md": b"# hi"}).items():
        (root / "a" / name).write_bytes(body)
    sources = Sources(SourceOptions(allow_path=(root,)))
    for source in (str(root / "a"), f"file://{root}/a"):
        fetched, files = fetch(sources, source)
        assert (files, fetched.source, fetched.revision) == (adapter_files(), source, None)
    with pytest.raises(AdapterRejected, match="has none") as refusal:
        fetch(sources, str(root / "a"), "main")
    assert refusal.value.param == "revision"


def test_a_resolver_has_to_be_allowed(root: Path) -> None:
    sources = Sources(SourceOptions(allow_path=(root,), resolver=f"{root}/{{name}}"))
    assert sources.resolve("x") == f"{root}/x"
    assert Sources(SourceOptions()).resolve("x") is None
    with pytest.raises(ValueError, match=r"--resolver: .*--allow-hub"):
        Sources(SourceOptions(allow_path=(root,), resolver="hf://org/{name}"))
