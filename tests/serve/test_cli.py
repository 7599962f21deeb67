"""The command line: options refused with a reason, and a whole server as a process, with the real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from onebase.serve.cli import app

COMMAND = [sys.executable, "-P", "-c", "from onebase.serve.cli import app; app()"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer with one token per byte."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=255, bos_token_id=254,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    folder = base.parent / "lora"
    folder.mkdir()
    key = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {f"{key}.lora_A.weight": torch.randn(2, 32), f"{key}.lora_B.weight": torch.randn(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def serving(*options: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it says that it is ready."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert "OneBase serves" in first, (folder / "log").read_text()
            yield process, first.split()[-1]
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def test_serve_answers_with_and_without_the_adapter_and_ends_cleanly(base: Path, lora: Path, tmp_path: Path) -> None:
    options = ["serve", str(base), "--port", "0", "--adapter", f"a={lora}", "--data-dir", str(tmp_path / "d")]
    with serving(*options, "--device", "cpu", folder=tmp_path) as (process, address):
        assert httpx.get(f"{address}/ready").status_code == 200
        cards = httpx.get(f"{address}/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "a"]
        texts = {model: complete(address, model) for model in ("tiny", "a", "a@1", "tiny")}
        assert texts["a"] == texts["a@1"] != texts["tiny"]
        assert "onebase_request_generated_tokens_total" in httpx.get(f"{address}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def complete(address: str, model: str) -> str:
    body = {"model": model, "prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
    return str(answer["choices"][0]["text"])


def test_a_refused_adapter_ends_the_start_with_the_reason(base: Path, lora: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((lora / "adapter_config.json").read_text())
    options = ["serve", str(base), "--port", "0", "--adapter", f"b={broken}", "--data-dir", str(tmp_path / "d")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*COMMAND, *options], check=False, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 1
    assert "onebase: --adapter b=" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve"], "model"),
        (["serve", "m", "--port", "70000"], "port"),
        (["serve", "m", "--device", "tpu"], "device"),
        (["serve", "m", "--host", "0.0.0.0"], "--admin-key"),
        (["serve", "m", "--adapter", "nope"], "NAME=FOLDER"),
        (["serve", "m", "--config", "/no/such/file.toml"], "--config"),
        (["serve", "m", "--max-loras", "4"], "--max-loras"),
        (["serve", "m", "--watch", "/no/such/folder"], "--watch"),
        (["serve", "m", "--allow-path", "/no/such/folder"], "--allow-path"),
        (["serve", "m", "--allow-hub", "a/b/c"], "--allow-hub"),
        (["serve", "m", "--allow-bucket", "ftp://x"], "--allow-bucket"),
        (["serve", "m", "--allow-url", "http://example.com"], "--allow-url"),
        (["serve", "m", "--resolver", "hf://org/adapter"], "--resolver"),
        (["serve", "m", "--host-cache", "-1"], "host_cache"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(settings: Any) -> None:
        raise AssertionError(f"started with {settings}")

    monkeypatch.setattr("onebase.serve.cli._run", started)
    monkeypatch.delenv("ONEBASE_MODEL", raising=False)
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == 2, done.output
    assert said in done.output


def test_every_setting_is_an_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from onebase.serve.config import Settings

    given: list[Any] = []
    monkeypatch.setattr("onebase.serve.cli._run", given.append)
    options = {
        "served_model_name": "n", "adapter": "a=/x", "host": "::1", "port": "1", "revision": "r", "dtype": "float32",
        "device": "cpu", "max_model_len": "2", "max_batch_tokens": "3", "max_num_seqs": "4", "device_memory": "0.5",
        "kv_memory": "6", "adapter_memory": "7", "data_dir": "/d", "allow_path": str(tmp_path), "max_upload_gib": "8",
        "max_inflight_seqs": "9", "max_inflight_tokens": "10", "api_key": "k", "admin_key": "l", "host_cache": "0",
        "allow_hub": "org", "allow_bucket": "s3://bucket/folder", "allow_url": "https://example.com/adapters",
        "resolver": "hf://org/{name}", "watch": str(tmp_path),
    }  # fmt: skip
    arguments = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    done = CliRunner().invoke(
        app, ["serve", "m", "--trust-remote-code", "--insecure", "--no-prefix-caching", "--deterministic", *arguments]
    )
    assert done.exit_code == 0, done.output
    (settings,) = given
    assert set(settings.model_fields_set) == set(Settings.model_fields)


def test_demo_has_its_own_name_and_a_data_folder_that_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    seen: list[Any] = []

    def started(settings: Any, tries: Any) -> None:
        assert settings.data_dir.is_dir()
        seen.append(settings)

    monkeypatch.setattr("onebase.serve.cli._run", started)
    monkeypatch.setattr("onebase.serve.demo.BASE", base)
    monkeypatch.setattr("onebase.serve.demo.ADAPTERS", {"shout": tmp_path})
    assert CliRunner().invoke(app, ["demo", "--port", "5"]).exit_code == 0
    (settings,) = seen
    assert (settings.base_name, settings.port, settings.adapters) == ("onebase-demo", 5, {"shout": tmp_path})
    assert not settings.data_dir.exists()
