"""``onebase adapters push``: an upload with a progress bar, or a request to fetch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from onebase.serve.adapter_commands.client import AdapterClient, CallFailed
from onebase.serve.adapter_commands.form import AdapterForm


def push(
    server: AdapterClient, name: str, source: str, revision: str | None, *, wait: bool, quiet: bool
) -> dict[str, Any]:
    """A folder of this machine is uploaded; everything else has a scheme (``hf://``), and the server fetches it.

    Raises CallFailed, and AdapterRejected for a folder that is none of an adapter.
    """
    if "://" in source:
        return server.fetch(name, source, revision, wait=wait)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise CallFailed(f"{source} is neither a folder of this machine nor a source with a scheme, such as hf://...")
    if revision is not None or not wait:
        raise CallFailed("--revision and --no-wait are for sources that the server fetches; a folder is uploaded now")
    return _upload(server, name, folder, quiet=quiet or not sys.stderr.isatty())


def _upload(server: AdapterClient, name: str, folder: Path, *, quiet: bool) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("uploading")

        def told(sent: int) -> None:
            progress.advance(task, sent)
            if progress.tasks[task].finished:
                progress.update(task, description="the server checks and compiles")

        form = AdapterForm(name, folder, told)
        progress.update(task, total=form.nbytes)
        return server.upload(form)
