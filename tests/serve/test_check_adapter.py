"""`onebase check`: what an adapter is on a base, in words and as JSON, and refusals without a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

from onebase.adapters.formats import compile_folder
from onebase.serve.check_adapter import base_flops, check_adapter, program_flops
from onebase.serve.cli import app
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model.loader import LoadedModel, load_model


def _save(base: Path, config: Any, folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def _load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), device="cpu", dtype=dtype))


def _check(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.fixture
def lora(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 8})
    return _save(checkpoint("llama"), config, tmp_path / "lora")


def test_the_numbers_are_those_of_the_files(lora: Path, checkpoint: Callable[..., Path]) -> None:
    done = _check(lora, "--model", checkpoint("llama"), "--json", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    elements = 2 * (4 * (64 + 64) + 8 * (96 + 64))  # two layers
    assert report["family"] == "LORA"
    assert report["sites"] == {"linear": 4}
    assert report["modules"] == {"down_proj": 2, "q_proj": 2}
    assert report["instructions"] == {"LowRank": 4}
    assert (report["rank_max"], report["rank_mean"]) == (8, 6.0)
    assert report["elements"] == elements
    assert elements * 2 <= report["own_bytes"] <= elements * 2 + 128
    assert report["shared_bytes"] == 0
    assert report["flops"] == 2 * elements
    base = 2 * (2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) + 128 * 64)  # q o, k v, the feed-forward; the head
    assert report["base_flops"] == base
    assert report["flops_share"] == pytest.approx(2 * elements / base)
    assert (report["scalable"], report["num_virtual_tokens"], report["num_labels"]) == (True, 0, 0)


def test_the_words(lora: Path, checkpoint: Callable[..., Path]) -> None:
    done = _check(lora, "--model", checkpoint("llama"))
    assert done.exit_code == 0, done.output
    for said in ("LORA", "4 linear", "2 down_proj, 2 q_proj", "8 at most, 6.0 on average", "MiB", "% of the base's"):
        assert said in done.stdout


def test_a_refusal_is_a_message(lora: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = lora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_replication": [[0, 2]]}))
    cases = {
        "layer_replication": (lora, checkpoint("llama")),
        "is not a file of an adapter": (tmp_path, checkpoint("llama")),
        "cannot be read": (tmp_path / "missing", checkpoint("llama")),
        "nothing": (lora, tmp_path / "nothing"),
    }
    for said, (adapter, model) in cases.items():
        done = _check(adapter, "--model", model)
        assert done.exit_code == 1
        assert done.stderr.startswith("onebase: ")
        assert said in done.stderr
        assert "Traceback" not in done.output
        assert not done.stdout


def test_options_are_checked_first(tmp_path: Path) -> None:
    for option in (("--dtype", "int8"), ("--device", "tpu")):
        assert _check(tmp_path, "--model", tmp_path, *option).exit_code == 2


def test_experts_count_only_where_a_token_goes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two of four experts: a term's products and the base's, counted one by one in a forward."""
    base = checkpoint("mixtral")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"])
    loaded = _load(base)
    report = check_adapter(_save(base, config, tmp_path / "experts"), loaded)
    assert report.sites == {"experts": 2}
    assert report.instructions == {"ExpertLowRank": 2}
    assert report.flops == 2 * 2 * (2 * 4 * (96 + 64))
    assert report.base_flops == 2 * (2 * (2 * 64 * 64 + 2 * 32 * 64 + 4 * 64 + 2 * 3 * 96 * 64) + 128 * 64)


def test_flops_are_what_torch_counts(checkpoint: Callable[..., Path], lora: Path) -> None:
    """The base's and the adapter's products, by torch's own counter over the merged-free reference."""
    from torch.utils.flop_counter import FlopCounterMode

    base = _load(checkpoint("llama"))
    program = compile_folder(lora, base, "d")
    with FlopCounterMode(display=False) as counter:
        for path, ops in program.ops.items():
            assert ops.low_rank is not None
            torch.ones(1, base.sites[path].in_features) @ ops.low_rank.a.T @ ops.low_rank.b
    assert program_flops(program, base) == counter.get_total_flops()
    linear = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        linear(torch.tensor([[1]]))
    attention = 2 * 2 * 2 * 4 * 16  # layers, products, one token's heads
    assert base_flops(base) <= counter.get_total_flops() <= base_flops(base) + attention + 1000
