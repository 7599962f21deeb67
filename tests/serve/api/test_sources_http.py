"""Adapters that the server fetches: allowed places, imports that are waited for or not, the resolver."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_folders_only_below_allow_path(run: Any, open_site: Any, adapter_folder: Any, tmp_path: Path) -> None:
    async def body() -> None:
        folder = adapter_folder()
        async with open_site() as site:
            response = await site.post("/v1/adapters", name="a", source=str(folder))
            assert response.status_code == 400
            assert "--allow-path" in response.json()["error"]["message"]
        outside = tmp_path / "outside"
        outside.mkdir()
        link = folder.parent / "link"
        link.symlink_to(outside)
        async with open_site(allow_path=(folder.parent,), data_dir=tmp_path / "other") as site:
            response = await site.post("/v1/adapters", name="a", source=str(folder))
            assert response.status_code == 201
            assert response.json()["source"] == str(folder)
            for source in ("/", str(outside), str(link), f"{folder}/../../outside", "\x00", "etc", str(folder) + "x"):
                response = await site.post("/v1/adapters", name="b", source=source)
                assert response.status_code in {400, 404}, source
            assert (await site.post("/v1/adapters", name="b", source=str(folder), revision="x")).status_code == 400

    run(body())
