"""Settings: precedence, refusals, and what reaches the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from onebase.serve.config import Settings, is_loopback, load_settings
from onebase.serve.engine.config import EngineConfig


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ONEBASE_{name.upper()}", raising=False)


def test_precedence_is_command_line_environment_file_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "onebase.toml"
    file.write_text('model = "file"\nport = 1\nmax_num_seqs = 2\nhost = "localhost"\nadapter = ["a=/x", "b=/y"]\n')
    monkeypatch.setenv("ONEBASE_PORT", "3")
    monkeypatch.setenv("ONEBASE_MAX_NUM_SEQS", "4")
    monkeypatch.setenv("ONEBASE_MAX_INFLIGHT_SEQS", "6")
    settings = load_settings({"max_num_seqs": 5}, file)
    assert (settings.model, settings.max_num_seqs, settings.port, settings.host) == ("file", 5, 3, "localhost")
    assert (settings.max_batch_tokens, settings.max_inflight_seqs) == (2048, 6)
    assert settings.adapters == {"a": Path("/x"), "b": Path("/y")}


def test_lists_from_the_environment_are_comma_separated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_ADAPTER", "a=/x, b=/y")
    monkeypatch.setenv("ONEBASE_ALLOW_PATH", str(tmp_path))
    monkeypatch.setenv("ONEBASE_MODEL", "m")
    settings = load_settings({})
    assert settings.adapters == {"a": Path("/x"), "b": Path("/y")}
    assert settings.allow_path == (tmp_path.resolve(),)


def test_sources_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_ALLOW_HUB", "org, other/name")
    monkeypatch.setenv("ONEBASE_ALLOW_URL", "https://example.com/a,https://example.com/b")
    monkeypatch.setenv("ONEBASE_RESOLVER", "hf://org/{name}")
    sources = load_settings({"model": "m"}).sources
    assert sources.allow_hub == ("org", "other/name")
    assert sources.allow_url == ("https://example.com/a", "https://example.com/b")
    assert sources.resolver == "hf://org/{name}"


def test_memory_is_a_size_or_a_range() -> None:
    config = load_settings({"model": "m", "kv_memory": "1.5", "adapter_memory": "0.5:4"}).engine_config()
    assert (config.kv_memory, config.kv_memory_max) == (1.5, None)
    assert (config.adapter_memory, config.adapter_memory_max) == (0.5, 4.0)


def test_unknown_keys_of_the_file_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "onebase.toml"
    file.write_text('model = "m"\nmax_loras = 4\n')
    with pytest.raises(ValidationError, match="max_loras"):
        load_settings({}, file)
    with pytest.raises(FileNotFoundError):
        load_settings({"model": "m"}, tmp_path / "nope.toml")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": ""},
        {"model": "/no/such/folder"},
        {"model": "./no/such/folder"},
        {"model": "m", "port": 65536},
        {"model": "m", "port": "x"},
        {"model": "m", "device": "tpu"},
        {"model": "m", "dtype": "int8"},
        {"model": "m", "device_memory": 0},
        {"model": "m", "device_memory": 1.1},
        {"model": "m", "max_model_len": 0},
        {"model": "m", "kv_memory": -1},
        {"model": "m", "kv_memory": "nan"},
        {"model": "m", "kv_memory": "2:1"},
        {"model": "m", "adapter_memory": "1:2:3"},
        {"model": "m", "adapter_memory": ":2"},
        {"model": "m", "adapter_memory": True},
        {"model": "m", "max_inflight_seqs": 0},
        {"model": "m", "max_inflight_tokens": 0},
        {"model": "m", "max_num_seqs": 8, "max_inflight_seqs": 7},
        {"model": "m", "adapter": ["noequals"]},
        {"model": "m", "adapter": ["a="]},
        {"model": "m", "adapter": ["../a=/x"]},
        {"model": "m", "adapter": ["a=/x", "a=/y"]},
        {"model": "m", "served_model_name": "a", "adapter": ["a=/x"]},
        {"model": "m", "allow_path": ["/no/such/folder"]},
        {"model": "m", "allow_hub": ["a b"]},
        {"model": "m", "allow_bucket": ["s3:/bucket"]},
        {"model": "m", "allow_url": ["https://user@example.com/"]},
        {"model": "m", "resolver": "hf://org/{name}/{name}"},
        {"model": "m", "watch": "/no/such/folder"},
        {"model": "m", "host_cache": -0.5},
        {"model": "m", "api_key": ""},
        {"model": "m", "what": 1},
        {"model": "m", "host": "0.0.0.0"},
        {"model": "m", "host": "0.0.0.0", "api_key": "k"},
        {"model": "m", "host": "0.0.0.0", "admin_key": "k"},
        {"model": "m", "host": "::"},
        {"model": "m", "host": "example.com"},
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        load_settings(options)


@pytest.mark.parametrize(
    "options",
    [
        {"host": "127.0.0.1"},
        {"host": "127.8.8.8"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "api_key": "a", "admin_key": "b"},
        {"host": "0.0.0.0", "insecure": True},
    ],
)
def test_allowed_hosts(options: dict[str, Any]) -> None:
    assert load_settings({"model": "m", **options}).host == options["host"]


def test_names_that_only_look_like_loopback_are_not() -> None:
    assert not is_loopback("localhost.example.com")
    assert not is_loopback("127.0.0.1.example.com")


def test_keys_do_not_show() -> None:
    settings = load_settings({"model": "m", "api_key": "hunter2", "admin_key": "hunter3"})
    assert "hunter" not in repr(settings)
    with pytest.raises(ValidationError) as refused:
        load_settings({"model": "m", "api_key": "hunter2", "port": -1})
    assert "hunter" not in str(refused.value)


def test_served_name(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert load_settings({"model": str(folder)}).base_name == "tiny"
    assert load_settings({"model": "org/tiny"}).base_name == "org/tiny"
    assert load_settings({"model": "org/tiny", "served_model_name": "t"}).base_name == "t"


def test_data_dir_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load_settings({"model": "m"}).data_dir == tmp_path / "onebase"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings({"model": "m"}).data_dir == tmp_path / ".local/share/onebase"


def test_engine_config_carries_every_option_that_the_engine_has() -> None:
    options: dict[str, Any] = {
        "model": "m", "revision": "r", "trust_remote_code": True, "dtype": "float32", "device": "cpu",
        "max_model_len": 1, "max_batch_tokens": 2, "max_num_seqs": 3, "device_memory": 0.5, "kv_memory": 4.0,
        "adapter_memory": 5.0, "prefix_caching": False, "host_cache": 6.0, "kv_dtype": "fp8_e4m3",
        "compiled_cache": 7.0, "overlap": False,
        "cuda_graphs": False, "speculate": "ngram", "speculative_tokens": 3, "ngram_min": 1, "ngram_max": 5,
    }  # fmt: skip
    settings = load_settings({**options, "data_dir": "/d"})
    assert settings.engine_config() == EngineConfig(**options, compiled_dir="/d/compiled")


@pytest.mark.parametrize(("value", "allowed"), [(0.0, True), (1.5, True), (1.0, False), (0.5, False), (-1.0, False)])
def test_a_step_stretches_by_more_than_one(value: float, allowed: bool) -> None:
    if allowed:
        assert Settings(model="m", max_step_stretch=value).engine_config().max_step_stretch == value
    else:
        with pytest.raises(ValidationError, match="max_step_stretch"):
            Settings(model="m", max_step_stretch=value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ngram_min": 5, "ngram_max": 4}, "below ngram_min"),
        ({"overlap": True, "speculate": "ngram"}, "overlap"),
        ({"overlap": True, "deterministic": True}, "overlap"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_settings({"model": "m", **options})
