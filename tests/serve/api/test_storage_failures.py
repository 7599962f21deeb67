"""A data folder whose disk fails: what clients are told, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from onebase.adapters.errors import StorageFailed, StorageFull, StorageUncertain
from onebase.adapters.registry import blobs
from onebase.serve.api.errors import as_api_error


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (StorageFull, 507, "insufficient_storage"),
        (StorageFailed, 500, "storage_failed"),
        (StorageUncertain, 500, "storage_failed"),
    ],
)
def test_errors_of_the_disk_have_codes(kind: type[StorageFailed], status: int, code: str) -> None:
    answer = as_api_error(kind("the disk"))
    assert (answer.status, answer.code, answer.message) == (status, code, "the disk")
    assert (answer.headers.get("x-should-retry") == "false") is (status == 507)


def test_an_upload_to_a_full_disk(
    run: Any, open_site: Any, adapter_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/secret/path")

    async def body() -> None:
        files = [("files", (file.name, file.read_bytes())) for file in adapter_folder().iterdir()]
        async with open_site() as site:
            with monkeypatch.context() as patch:
                patch.setattr(blobs.os, "rename", full)
                refused = await site.http.post("/v1/adapters", data={"name": "a"}, files=files)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (507, "insufficient_storage")
            assert "No space left" in error["message"]
            assert "secret" not in error["message"]
            assert site.server.loaded.store.registry.count() == 0
            assert (await site.http.post("/v1/adapters", data={"name": "a"}, files=files)).status_code == 201

    run(body())
