"""vLLM's load and unload routes, with its texts and status codes."""

from __future__ import annotations

from typing import Any

from onebase.adapters.errors import AdapterRejected


def test_vllm_routes(run: Any, open_site: Any, adapter_folder: Any) -> None:
    async def body() -> None:
        folder = adapter_folder()
        other = adapter_folder("other", 5)
        async with open_site(allow_path=(folder.parent,)) as site:

            async def load(**body: Any) -> Any:
                return await site.post("/v1/load_lora_adapter", **{"lora_name": "a", "lora_path": str(folder), **body})

            response = await load()
            assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'a' added successfully.")
            response = await load()
            assert response.status_code == 400
            assert "already been loaded" in response.json()["error"]["message"]
            assert (await load(lora_path=str(other), load_inplace=True)).status_code == 200
            assert (await site.http.get("/v1/adapters/a")).json()["version"] == 2
            assert (await load(lora_name="b", lora_path=str(folder / "nope"))).status_code == 404
            assert (await load(lora_name="b", lora_path="/etc")).status_code == 400
            assert (await load(lora_name="../b")).status_code == 400
            assert (await load(lora_name="base")).status_code == 400
            assert (await load(lora_name="")).status_code == 400
            assert (await site.post("/v1/load_lora_adapter", lora_name="b")).status_code == 400
            site.engine.load_failure = AdapterRejected("no")
            assert (await load(lora_name="b")).status_code == 400

            response = await site.post("/v1/unload_lora_adapter", lora_name="a")
            assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
            assert (await site.post("/v1/unload_lora_adapter", lora_name="a")).status_code == 404
            assert (await site.post("/v1/unload_lora_adapter")).status_code == 400
            assert (await site.complete(model="a")).status_code == 404

    run(body())
