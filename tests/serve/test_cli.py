"""The command line: options refused with a reason, and a whole server as a process, with the real engine."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from onebase.serve.cli import app

from .conftest import COMMAND, serving


def test_serve_answers_with_and_without_the_adapter_and_ends_cleanly(
    tiny_base: Path, make_lora: Any, tmp_path: Path
) -> None:
    options = [
        "serve",
        str(tiny_base),
        "--port",
        "0",
        "--adapter",
        f"a={make_lora(0)}",
        "--data-dir",
        str(tmp_path / "d"),
    ]
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


def test_a_refused_adapter_ends_the_start_with_the_reason(tiny_base: Path, make_lora: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((make_lora(0) / "adapter_config.json").read_text())
    options = ["serve", str(tiny_base), "--port", "0", "--adapter", f"b={broken}", "--data-dir", str(tmp_path / "d")]
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
    keys = tmp_path / "keys.toml"
    keys.write_text('[[tenant]]\nname = "a"\nkeys = ["0123456789abcdef"]\n')
    options = {
        "keys": str(keys),
        "served_model_name": "n", "adapter": "a=/x", "host": "::1", "port": "1", "revision": "r", "dtype": "float32",
        "device": "cpu", "max_model_len": "2", "max_batch_tokens": "3", "max_num_seqs": "4", "device_memory": "0.5",
        "kv_memory": "6", "adapter_memory": "7", "data_dir": "/d", "allow_path": str(tmp_path), "max_upload_gib": "8",
        "max_inflight_seqs": "9", "max_inflight_tokens": "10", "api_key": "k", "admin_key": "l", "host_cache": "0",
        "allow_hub": "org", "allow_bucket": "s3://bucket/folder", "allow_url": "https://example.com/adapters",
        "resolver": "hf://org/{name}", "watch": str(tmp_path), "kv_dtype": "fp8_e4m3", "compiled_cache": "3",
        "max_step_stretch": "3",
        "speculate": "ngram", "speculative_tokens": "3", "ngram_min": "1", "ngram_max": "5",
    }  # fmt: skip
    arguments = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    done = CliRunner().invoke(
        app,
        [
            "serve",
            "m",
            "--trust-remote-code",
            "--insecure",
            "--no-prefix-caching",
            "--deterministic",
            "--no-overlap",
            "--no-cuda-graphs",
            *arguments,
        ],
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
