"""Adapters made to hurt: refused with 4xx in under a second, without memory, while others are served."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

Files = dict[str, bytes]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
SECONDS = 1.0  # of all threads
MEMORY = 96 << 20  # bytes that the process may grow by for one refusal, the request's own among them


def good(folder: Path) -> Files:
    """A LoRA for the tiny Llama of the fixtures: q_proj is 32 x 32."""
    tensors = {KEY.format("A"): torch.randn(2, 32), KEY.format("B"): torch.randn(32, 2)}
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: (folder / WEIGHTS).read_bytes()}


def configured(files: Files, **fields: Any) -> Files:
    return files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | fields).encode()}


def headed(files: Files, header: bytes, data: bytes = b"") -> Files:
    return files | {WEIGHTS: struct.pack("<Q", len(header)) + header + data}


def entries(**tensors: tuple[list[int], list[int]]) -> bytes:
    return json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": at} for name, (shape, at) in tensors.items()}
    ).encode()


def with_tensors(files: Files, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Files:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "changed.safetensors")
    return files | {WEIGHTS: (folder / "changed.safetensors").read_bytes()}


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A")][0, 0] = float("nan")


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY.format("A")] = torch.zeros(2, 31)


def half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[KEY.format("B")]


def elsewhere(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.0", "layers.99")] = tensors.pop(name)


def tiny_tensors(count: int) -> bytes:
    one = '"t{0}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return ("{" + ",".join(one.format(index) for index in range(count)) + "}").encode()


def made(files: Files, folder: Path) -> dict[str, Files]:
    """What is wrong -> the files. The first twelve are those that every other server was tried with."""
    weights = files[WEIGHTS]
    one = entries(a=([1], [0, 4]))
    return {
        "a pickle": {CONFIG: files[CONFIG], "adapter_model.bin": b"\x80\x04K\x01."},
        "truncated": files | {WEIGHTS: weights[:-8]},
        "NaN": with_tensors(files, folder, not_a_number),
        "a wrong shape": with_tensors(files, folder, wrong_shape),
        "a wrong rank": configured(files, r=5),
        "half an adapter": with_tensors(files, folder, half),
        "no such module": with_tensors(files, folder, elsewhere),
        "an unknown family": configured(files, peft_type="NOVEL"),
        "an unknown field": configured(files, use_novel_trick=True),
        "no JSON": files | {CONFIG: b"{"},
        "no config": {WEIGHTS: weights},
        "no weights": {CONFIG: files[CONFIG]},
        "a header of a terabyte": files | {WEIGHTS: struct.pack("<Q", 1 << 40) + weights[8:]},
        "a tensor of a terabyte": headed(files, entries(a=([1 << 38], [0, 1 << 40]))),
        "sizes that overflow": headed(files, entries(a=([1 << 32, 1 << 32], [0, 0]))),
        "overlapping tensors": headed(files, entries(a=([4], [0, 16]), b=([4], [8, 24])), bytes(24)),
        "a hole": headed(files, entries(a=([4], [0, 16]), b=([4], [32, 48])), bytes(48)),
        "duplicate keys": headed(files, b"{" + one[1:-1] + b"," + one[1:], bytes(4)),
        "a million tensors": headed(files, tiny_tensors(1_000_000)),
        "many tensors within the limit": headed(files, tiny_tensors(15_000)),
        "a deep header": headed(files, b"[" * 1_000_000),
        "a config of 200 MB": files | {CONFIG: b'{"a": "' + b"x" * (200 << 20) + b'"}'},
        "a deep config": files | {CONFIG: b"[" * 900_000},
        "a wide config": files | {CONFIG: json.dumps({f"k{i}": i for i in range(60_000)}).encode()},
        "duplicate config keys": files | {CONFIG: b'{"r": 2, "r": 3}'},
        "a pattern that backtracks": configured(files, rank_pattern={"(a+)+$|" + "(.*)*" * 40 + "b": 3}),
        "ten thousand patterns": configured(files, alpha_pattern={f"(x|{i})*y": 3 for i in range(10_000)}),
        "a rank of a billion": configured(files, r=1_000_000_000),
        "an alpha of infinity": files | {CONFIG: files[CONFIG].replace(b'"lora_alpha": 4', b'"lora_alpha": Infinity')},
    }  # fmt: skip


@pytest.mark.timeout(240)
def test_refused_in_under_a_second_with_memory_flat(
    run: Any, open_real: Any, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    files = good(tmp_path)
    process = psutil.Process()

    async def send(site: Any, parts: Files) -> tuple[Any, float]:
        """The answer and the processor time that it took, whatever else the machine does; the form is built before.
        What a large body takes by itself is taken off: four times as long as hashing it, here and now."""
        request = site.http.build_request(
            "POST", "/v1/adapters", data={"name": "bad"}, files=[("files", item) for item in parts.items()]
        )
        content = b"".join([chunk async for chunk in request.stream])
        started = time.process_time()
        hashlib.sha256(content)
        hashed = time.process_time()
        answer = await site.http.post("/v1/adapters", content=content, headers=dict(request.headers))
        return answer, time.process_time() - hashed - 4 * (hashed - started)

    async def body() -> None:
        async with open_real() as site:
            assert (await send(site, files))[0].status_code == 201, "what all of them begin with"
            await site.http.delete("/v1/adapters/bad")
            for what, parts in made(files, tmp_path).items():
                with subtests.test(what):
                    before = process.memory_info().rss
                    answer, seconds = await send(site, parts)
                    size = sum(map(len, parts.values()))
                    assert 400 <= answer.status_code < 500, answer.text[:300]
                    assert len(answer.text) < 2000
                    assert seconds < SECONDS, seconds
                    assert process.memory_info().rss - before < MEMORY + 2 * size
            assert (await site.complete(max_tokens=2)).status_code == 200
            assert (await site.http.get("/v1/adapters")).json()["data"] == []

    run(body())
