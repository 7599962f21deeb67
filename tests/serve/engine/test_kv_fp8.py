"""Pages in fp8: more of them, and answers that are near those of full pages whatever the schedule."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onebase.adapters.errors import ModelRejected
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.prefix import KvPrefix
from onebase.kernels.pages import LayerShape, SlotLayout
from onebase.serve.model.loader import pick_fp8

from .programs import Programs

Make = Callable[..., Any]
FP8 = {"kv_dtype": "fp8_e4m3", "max_model_len": 64}


def test_the_same_memory_holds_more_pages(make_driver: Make) -> None:
    """The tiny Llama has 16 elements a head: 64 bytes in float32, 32 in bfloat16, 17 in fp8."""
    for dtype, factor in (("float32", 3.7), ("bfloat16", 1.85)):
        sizes = {"dtype": dtype, "kv_memory": 0.001, "max_num_seqs": 1024, "page_size": 64}
        full = make_driver("llama", **sizes, max_model_len=64).engine.info.num_pages
        assert make_driver("llama", **sizes, **FP8).engine.info.num_pages >= factor * full


@pytest.mark.parametrize(("layers", "heads", "dim"), [(30, 3, 64), (16, 8, 64), (32, 8, 128), (28, 4, 128)])
def test_slots_of_real_shapes_are_about_half(layers: int, heads: int, dim: int) -> None:
    full, fp8 = (
        SlotLayout.of([LayerShape(heads, dim, torch.bfloat16, torch.device("cpu"), fp8)] * layers, 16).nbytes
        for fp8 in (False, True)
    )
    assert 0.5 < fp8 / full < 0.55


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_log_probabilities_are_near_those_of_full_pages(architecture: str, make_driver: Make) -> None:
    """In one go and in chunks; windows, soft caps and sinks included. The tiny models' logits spread by about 3."""
    prompts = [([3 + i, *range(10, 50)], ()) for i in range(3)]
    full = make_driver(architecture, max_model_len=64).logprobs(prompts, 64)
    for chunk in (64, 7, 1):
        got = make_driver(architecture, **FP8).logprobs(prompts, chunk)
        for one, other in zip(got, full, strict=True):
            error = one[40] - other[40]
            assert 0 < float(error.abs().mean()) < 0.3


def test_any_schedule_gives_what_each_request_gives_alone(make_driver: Make) -> None:
    """Chunks, preemption, shared pages and stored prefixes."""
    alone = make_driver("llama", **FP8)
    crowded = make_driver("llama", **FP8, kv_memory=0.00005, max_num_seqs=6, max_batch_tokens=24)
    draw, rng = torch.Generator().manual_seed(3), random.Random(3)
    jobs = [([5, 6, 7, 8] * 3 + [rng.randrange(10, 90) for _ in range(rng.randrange(1, 20))], i % 3 == 0)
            for i in range(12)]  # fmt: skip
    stored = [KvPrefix(*torch.randn(2, 5, 2, 16, generator=draw)) for _ in range(2)]
    ops = {f"model.layers.{index}.self_attn": SiteOps(extra=(op,)) for index, op in enumerate(stored)}
    uses = []
    for driver in (alone, crowded):
        programs = Programs(driver)
        programs.add("prefix", ops, num_virtual_tokens=5, first_position=5)
        uses.append(programs.use("prefix"))
    want = [alone.generate(prompt, *([uses[0]] if adapted else []), max_tokens=20) for prompt, adapted in jobs]
    ids = [crowded.submit(prompt, *([uses[1]] if adapted else []), max_tokens=20) for prompt, adapted in jobs]
    crowded.run()
    assert crowded.engine.stats().preemptions > 0
    assert crowded.engine.stats().cached_tokens > 0
    assert [crowded.outputs[request_id] for request_id in ids] == want


def test_a_gpu_that_cannot_convert_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: Any = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of 2020")
    for capability, allowed in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert pick_fp8("auto", cuda) is False
        if allowed:
            assert pick_fp8("fp8_e4m3", cuda)
        else:
            with pytest.raises(ModelRejected, match=r"kv_dtype: fp8_e4m3 needs .* a GPU of 2020") as caught:
                pick_fp8("fp8_e4m3", cuda)
            assert caught.value.param == "kv_dtype"
