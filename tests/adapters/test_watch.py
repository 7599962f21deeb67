from __future__ import annotations

import os
from pathlib import Path

import pytest

from onebase.adapters.watch import Changes, FolderWatch, scan

NOTHING = Changes((), (), ())


def put(root: Path, name: str, text: str = "x", *, mtime: int = 1) -> Path:
    file = root / name / "adapter_config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    os.utime(file, (mtime, mtime))
    return file


def look(watch: FolderWatch, root: Path) -> Changes:
    return watch.step(scan(root))


def test_a_folder_counts_once_it_has_stood_still(tmp_path: Path) -> None:
    watch = FolderWatch()
    put(tmp_path, "a")
    assert look(watch, tmp_path) == NOTHING
    put(tmp_path, "a", "longer")
    assert look(watch, tmp_path) == NOTHING
    put(tmp_path, "a", "longer", mtime=2)
    assert look(watch, tmp_path) == NOTHING
    assert look(watch, tmp_path) == Changes(("a",), (), ())
    assert look(watch, tmp_path) == NOTHING


@pytest.mark.parametrize("change", ["text", "mtime", "new file", "file gone", "renamed"])
def test_every_change_is_seen_and_settles_again(tmp_path: Path, change: str) -> None:
    watch = FolderWatch()
    file = put(tmp_path, "a")
    (tmp_path / "a" / "other").write_text("y")
    look(watch, tmp_path)
    look(watch, tmp_path)
    match change:
        case "text":
            put(tmp_path, "a", "xyz")
        case "mtime":
            put(tmp_path, "a", mtime=3)
        case "new file":
            (tmp_path / "a" / "third").write_text("z")
        case "file gone":
            (tmp_path / "a" / "other").unlink()
        case "renamed":
            file.rename(tmp_path / "a" / "config")
    assert look(watch, tmp_path) == NOTHING
    assert look(watch, tmp_path) == Changes(("a",), (), ())


def test_gone_is_missing_twice(tmp_path: Path) -> None:
    watch = FolderWatch()
    put(tmp_path, "a")
    look(watch, tmp_path)
    look(watch, tmp_path)
    (tmp_path / "a").rename(tmp_path / ".a")
    assert look(watch, tmp_path) == NOTHING
    (tmp_path / ".a").rename(tmp_path / "a")
    assert look(watch, tmp_path) == NOTHING
    assert look(watch, tmp_path) == NOTHING  # as it was: not a change
    (tmp_path / "a").rename(tmp_path / ".a")
    look(watch, tmp_path)
    assert look(watch, tmp_path) == Changes((), ("a",), ())
    assert look(watch, tmp_path) == NOTHING


def test_what_an_earlier_process_took_may_be_gone_or_there(tmp_path: Path) -> None:
    watch = FolderWatch(owned=("a", "b"))
    put(tmp_path, "a")
    assert look(watch, tmp_path) == NOTHING
    assert look(watch, tmp_path) == Changes(("a",), ("b",), ())


def test_a_folder_that_never_settled_is_not_gone(tmp_path: Path) -> None:
    watch = FolderWatch()
    put(tmp_path, "a")
    look(watch, tmp_path)
    (tmp_path / "a").rename(tmp_path / ".a")
    assert [look(watch, tmp_path) for _ in range(3)] == [NOTHING] * 3


def test_again(tmp_path: Path) -> None:
    watch = FolderWatch()
    put(tmp_path, "a")
    look(watch, tmp_path)
    look(watch, tmp_path)
    watch.again("a")
    watch.again("unknown")
    assert look(watch, tmp_path) == Changes(("a",), (), ())


def test_odd_names_are_told_once(tmp_path: Path) -> None:
    watch = FolderWatch()
    for name in ("a,b", "ä", "x" * 129, "-a", ".hidden"):
        put(tmp_path, name)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert look(watch, tmp_path) == Changes((), (), tuple(sorted(("a,b", "ä", "x" * 129, "-a"))))
    assert look(watch, tmp_path) == NOTHING


def test_a_root_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        scan(tmp_path / "nowhere")


def test_a_folder_full_of_files_is_not_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for index in range(200):
        (tmp_path / "a" / str(index)).write_text("")
    assert len(scan(tmp_path).folders["a"].entries) < 100
