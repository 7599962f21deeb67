"""Several adapters on one request through HTTP, over a real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

WIDTH = 32


@pytest.fixture
def lora_folder(tmp_path: Path) -> Callable[..., Path]:
    """lora_folder(name, seed, **config): LoRA on the first query projection of the tiny real model."""

    def make(name: str, seed: int, **config: Any) -> Path:
        folder = tmp_path / "real" / name
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora"
        a, b = (torch.randn(*shape, generator=generator) for shape in ((2, WIDTH), (WIDTH, 2)))
        save_file({f"{key}_A.weight": a, f"{key}_B.weight": b}, folder / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return folder

    return make


def test_pairs_are_refused_with_400_in_the_names_of_the_request(
    run: Any, open_real: Any, lora_folder: Callable[..., Path]
) -> None:
    async def body() -> None:
        folders = {
            "first": lora_folder("first", 1, alora_invocation_tokens=[70, 71]),
            "second": lora_folder("second", 2, alora_invocation_tokens=[72]),
            "plain": lora_folder("plain", 3),
        }
        async with open_real(adapter=tuple(f"{name}={path}" for name, path in folders.items())) as site:
            for stream in (False, True):
                asked = [{"name": "plain", "scale": 0.5}, {"name": "second"}]
                refused = await site.complete(model="first@1", adapters=asked, max_tokens=1, stream=stream)
                error = refused.json()["error"]
                assert refused.status_code == 400
                assert (error["code"], error["param"]) == ("request_rejected", "adapters")
                assert "'first@1'" in error["message"]
                assert "'second'" in error["message"]
                assert "plain" not in error["message"]
            fine = await site.complete(model="first", adapters=[{"name": "plain", "scale": 0.5}], max_tokens=1)
            assert fine.status_code == 200, fine.text
            assert fine.headers["x-onebase-adapters"] == "first@1;scale=1, plain@1;scale=0.5"

    run(body())


def test_scales_change_the_answer_and_zero_is_the_base(
    run: Any, open_real: Any, lora_folder: Callable[..., Path]
) -> None:
    async def body() -> None:
        paths = {name: lora_folder(name, seed) for seed, name in enumerate(("a", "b"))}
        async with open_real(adapter=tuple(f"{name}={path}" for name, path in paths.items())) as site:

            async def told(**asked: Any) -> list[float]:
                options = {"prompt": "the quick brown fox", "max_tokens": 0, "echo": True, "logprobs": 0}
                answer = (await site.complete(**options, **asked)).json()
                values: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
                return values

            base = await told()
            off = await told(adapters=[{"name": "a", "scale": 0}, {"name": "b", "scale": 0}])
            assert off == base
            alone = await told(model="a")
            assert await told(adapters=[{"name": "a"}]) == pytest.approx(alone, abs=1e-5)
            both = await told(model="a", adapters=[{"name": "b", "scale": -0.5}])
            for one, other in ((base, alone), (alone, both), (base, both)):
                assert max(abs(x - y) for x, y in zip(one, other, strict=True)) > 0.01

    run(body())
