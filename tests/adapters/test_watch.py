from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from onebase.adapters.watch import Changes, FolderWatch, scan

NOTHING = Changes((), (), ())


def put(root: Path, name: str, text: str = "x", *, mtime: int = 1) -> Path:
    file = root / name / "adapter_config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    os.utime(file, (mtime, mtime))
    return file


def look(watch: FolderWatch, root: Path, now: float = 0.0) -> Changes:
    return watch.step(scan(root), now)


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


def watching(root: Path, *names: str) -> FolderWatch:
    """They are there and taken."""
    watch = FolderWatch(patience=60.0)
    for name in names:
        put(root, name)
    look(watch, root)
    assert look(watch, root).settled == names
    return watch


def test_gone_is_missing_for_a_minute(tmp_path: Path) -> None:
    watch = watching(tmp_path, "a", "b")
    (tmp_path / "a").rename(tmp_path / ".a")
    assert [look(watch, tmp_path, now) for now in (10.0, 40.0, 69.0)] == [NOTHING] * 3
    (tmp_path / ".a").rename(tmp_path / "a")
    assert [look(watch, tmp_path, now) for now in (70.0, 71.0)] == [NOTHING] * 2, "as it was: not a change"
    (tmp_path / "a").rename(tmp_path / ".a")
    assert [look(watch, tmp_path, now) for now in (100.0, 159.0)] == [NOTHING] * 2, "the time begins anew"
    assert look(watch, tmp_path, 160.0) == Changes((), ("a",), ())
    assert look(watch, tmp_path, 300.0) == NOTHING


def test_one_look_is_not_enough_however_patient(tmp_path: Path) -> None:
    watch = FolderWatch(("a",), patience=0.0)
    put(tmp_path, "b")
    assert look(watch, tmp_path, 1000.0).gone == ()
    assert look(watch, tmp_path, 1000.0).gone == ("a",)


def test_a_look_that_shows_no_folder_takes_nothing_away(tmp_path: Path) -> None:
    """As where a volume is not mounted, at a start too."""
    watch = watching(tmp_path, "a", "b")
    for name in "ab":
        (tmp_path / name).rename(tmp_path / f".{name}")
    for some in (watch, FolderWatch(("a", "b"), patience=0.0)):
        for now in (0.0, 100.0, 200.0):
            changes = look(some, tmp_path, now)
            assert (changes.gone, changes.doubt) == ((), "it shows no adapter folder at all")
    (tmp_path / ".a").rename(tmp_path / "a")
    assert look(watch, tmp_path, 201.0) == NOTHING, "what b was missing before does not count"
    assert look(watch, tmp_path, 261.0).gone == ("b",)


def test_another_root_of_the_same_name_takes_nothing_away_at_first(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    watch = watching(root, "a", "b")
    root.rename(tmp_path / "unmounted")
    root.mkdir()
    put(root, "b")
    changes = look(watch, root, 1000.0)
    assert (changes.gone, changes.doubt) == ((), "it is another folder than it was")
    assert look(watch, root, 1001.0) == NOTHING
    assert look(watch, root, 1061.0).gone == ("a",)


def test_a_look_that_failed_begins_the_time_anew(tmp_path: Path) -> None:
    watch = watching(tmp_path, "a", "b")
    (tmp_path / "a").rename(tmp_path / ".a")
    look(watch, tmp_path, 0.0)
    watch.look_failed()
    assert look(watch, tmp_path, 100.0) == NOTHING
    assert look(watch, tmp_path, 160.0).gone == ("a",)


def test_a_folder_that_cannot_be_read_is_neither_there_nor_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watching(tmp_path, "a", "b")
    real = os.scandir

    def refuse(path: Any) -> Any:
        if path == tmp_path / "a":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert scan(tmp_path).unknown == {"a"}
    assert [look(watch, tmp_path, now) for now in (10.0, 100.0, 200.0)] == [NOTHING] * 3
    monkeypatch.undo()
    assert [look(watch, tmp_path, now) for now in (201.0, 202.0)] == [NOTHING] * 2


def test_what_an_earlier_process_took_may_be_gone_or_there(tmp_path: Path) -> None:
    watch = FolderWatch(owned=("a", "b"))
    put(tmp_path, "a")
    assert look(watch, tmp_path) == NOTHING
    assert look(watch, tmp_path, 60.0) == Changes(("a",), ("b",), ())


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
    assert look(watch, tmp_path) == Changes(("a",), (), ())
    watch.again("whose deletion failed")
    assert look(watch, tmp_path, 0.0) == NOTHING
    assert look(watch, tmp_path, 60.0).gone == ("whose deletion failed",)


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
