"""Folders of this machine, below those that the operator allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onebase.adapters.errors import AdapterNotFound, AdapterRejected
from onebase.adapters.registry.blobs import copy_folder
from onebase.adapters.sources.intake import Intake
from onebase.adapters.sources.location import shown


class FolderSource:
    """``/folder`` or ``file:///folder``. Its files are copied as an upload's are: an unknown one refuses it."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots

    def check(self, source: str, revision: str | None) -> None:
        if revision is not None:
            raise AdapterRejected("revision: a folder of the server has none.", param="revision")
        self._folder(source)

    def fetch(self, source: str, revision: str | None, intake: Intake) -> None:
        self.check(source, revision)
        copy_folder(self._folder(source), intake.stage)

    def _folder(self, source: str) -> Path:
        path = source.removeprefix("file://") if source.startswith("file:///") else source
        return allowed_folder(path, self._roots)


def allowed_folder(source: str, roots: Sequence[Path]) -> Path:
    """The folder that ``source`` names, if it lies below one of the operator's roots once links are resolved.

    Raises AdapterRejected, with one message for all that lies elsewhere, so that nobody can probe the disk;
    AdapterNotFound where it lies below a root but is no folder.
    """
    if not roots:
        raise AdapterRejected("Loading from a path of the server is off; --allow-path turns it on.", param="source")
    try:
        folder = Path(source).resolve()
    except (OSError, RuntimeError, ValueError):
        raise _not_below(source) from None
    if not Path(source).is_absolute() or not any(folder.is_relative_to(root.resolve()) for root in roots):
        raise _not_below(source)
    if not folder.is_dir():
        raise AdapterNotFound(f"{shown(source)} is not a folder.", param="source")
    return folder


def _not_below(source: str) -> AdapterRejected:
    return AdapterRejected(f"{shown(source)} is not an absolute path below an --allow-path.", param="source")
