"""Broken and hostile adapters are refused, with a message that names what is wrong."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onebase.adapters.check import check_finite, check_folder
from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.formats import compile_folder, families, register
from onebase.kernels.ops.dense import OutputRows

from .conftest import TinyBase, edit_config, edit_tensors

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = "adapter_model.safetensors"


def compile_for(path: Path, llama: nn.Module) -> None:
    check_finite(check_folder(path))
    compile_folder(path, TinyBase(llama), "digest")


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file by hand. ``header`` may be bytes, so that it can be anything."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / TENSORS).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "empty": (b"", b"", "not a JSON object"),
    "not json": (b"hello", b"", "not a JSON object"),
    "list": ([], b"", "not a JSON object"),
    "not utf-8": (b'{"\xff":1}', b"", "UTF-8"),
    "unclosed": (b'{"a":' + json.dumps(tensor([1], 0, 4)).encode(), bytes(4), "not one valid JSON object"),
    "trailing comma": (b'{"a":' + json.dumps(tensor([1], 0, 4)).encode() + b",}", bytes(4), "valid JSON"),
    "trailing text": (b"{} x", b"", "not one valid JSON object"),
    "entry is a number": ({"a": 1, "b": tensor([1], 0, 4)}, bytes(4), "entry of 'a'"),
    "field missing": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "exactly dtype, shape"),
    "field extra": ({"a": {**tensor([1], 0, 4), "x": 1}}, bytes(4), "exactly dtype, shape"),
    "dtype unknown": ({"a": tensor([1], 0, 4, "F33")}, bytes(4), "dtype of 'a'"),
    "dtype no string": ({"a": tensor([1], 0, 4, ["F32"])}, bytes(4), "dtype of 'a'"),
    "shape lies": ({"a": tensor([2], 0, 4)}, bytes(4), "lies about its size"),
    "shape negative": ({"a": tensor([-1, -1], 0, 4)}, bytes(4), "non-negative"),
    "shape bool": ({"a": tensor([True], 0, 4)}, bytes(4), "non-negative"),
    "shape float": ({"a": tensor([1.0], 0, 4)}, bytes(4), "non-negative"),
    "shape overflows": ({"a": tensor([1 << 62, 4], 0, 0)}, b"", "lies about its size"),
    "shape huge integer": ({"a": tensor([1 << 90], 0, 4)}, bytes(4), "below 2"),
    "shape of nine": ({"a": tensor([1] * 9, 0, 4)}, bytes(4), "at most 8 dimensions"),
    "offsets swapped": ({"a": tensor([1], 4, 0)}, bytes(4), "lies about its size"),
    "offsets of three": ({"a": {**tensor([1], 0, 4), "data_offsets": [0, 4, 8]}}, bytes(4), "two data_offsets"),
    "offset bool": ({"a": tensor([0], False, False)}, b"", "non-negative"),
    "hole": ({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12), "hole or overlap"),
    "overlap": ({"a": tensor([2], 0, 8), "b": tensor([1], 4, 8)}, bytes(8), "hole or overlap"),
    "hole at the start": ({"a": tensor([1], 4, 8)}, bytes(8), "hole or overlap"),
    "bytes left over": ({"a": tensor([1], 0, 4)}, bytes(5), "belong to no tensor"),
    "terabyte": ({"a": tensor([1 << 38], 0, 1 << 40)}, bytes(4), "behind the end of the file"),
    "duplicate key": (b'{"a":%s,"a":%s}' % ((json.dumps(tensor([0], 0, 0)).encode(),) * 2), b"", "twice"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}}', b"", "twice"),
    "unprintable name": ({"a\n": tensor([1], 0, 4)}, bytes(4), "unprintable"),
    "lone surrogate": (b'{"\\ud800":1}', b"", "unprintable"),
    "empty name": ({"": tensor([1], 0, 4)}, bytes(4), "empty"),
    "long name": ({"a" * 1025: tensor([1], 0, 4)}, bytes(4), "1,024"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "strings to strings"),
    "metadata list": ({"__metadata__": ["a"]}, b"", "strings to strings"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", "twice"),
    "metadata key twice": (b'{"__metadata__":{"a":"b","a":"b"}}', b"", "twice"),
    "nested deep": (b'{"a":' + b'{"a":' * 10_000, b"", "entry of 'a'"),
    "nested metadata": (b'{"__metadata__":' + b"[" * 100_000, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers(case: str, adapter: Path) -> None:
    header, data, message = HEADERS[case]
    write_header(adapter, header, data)
    with pytest.raises(AdapterRejected, match=message):
        check_folder(adapter)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 200, 1 << 40])
def test_header_length_beyond_the_file(length: int, adapter: Path) -> None:
    write_header(adapter, {}, b"", length)
    with pytest.raises(AdapterRejected, match="truncated"):
        check_folder(adapter)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_file(keep: int, adapter: Path) -> None:
    file = adapter / TENSORS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AdapterRejected, match=TENSORS):
        check_folder(adapter)


HUGE: dict[str, Callable[[], bytes]] = {
    "many tensors": lambda: b"{" + b",".join(_tiny(i) for i in range(400_000)) + b"}",
    "long header": lambda: b"{" + b" " * (40 << 20) + b"}",
    "many numbers": lambda: b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"0," * 9_000_000 + b"0]}}",
    "much metadata": lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(900_000)) + b"}}",
}


def _tiny(index: int) -> bytes:
    return b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % index


@pytest.mark.parametrize("case", HUGE)
def test_huge_headers_cost_little(case: str, adapter: Path) -> None:
    header = HUGE[case]()
    write_header(adapter, header)
    started = time.process_time()
    with pytest.raises((AdapterRejected, AdapterTooLarge)):
        check_folder(adapter)
    assert time.process_time() - started < 1
    tracemalloc.start()
    with pytest.raises((AdapterRejected, AdapterTooLarge)):
        check_folder(adapter)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(header) + (16 << 20)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(value: float, dtype: torch.dtype, adapter: Path, llama: nn.Module) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q0}.lora_B.weight"] = tensors[f"{Q0}.lora_B.weight"].to(dtype)
        tensors[f"{Q0}.lora_B.weight"][31, 3] = value

    edit_tensors(adapter, poison)
    with pytest.raises(AdapterRejected, match=r"layers\.0\.self_attn\.q_proj\.lora_B.*NaN"):
        check_finite(check_folder(adapter))
    with pytest.raises(AdapterRejected, match=r"layers\.0\.self_attn\.q_proj\.lora_B.*NaN"):
        compile_folder(adapter, TinyBase(llama), "d")


def test_not_finite_behind_the_first_chunk(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase.adapters.check.CHUNK_BYTES", 64)
    edit_tensors(adapter, lambda t: t[f"{Q0}.lora_A.weight"][3].fill_(float("inf")))
    with pytest.raises(AdapterRejected, match="NaN"):
        check_finite(check_folder(adapter))


FILES = [
    "adapter_model.bin",
    "weights.PT",
    "x.pkl",
    "evil.py",
    "adapter_config.json ",
    "adapter_config.JSON",
]
FILES += ["adapter_соnfig.json", "a\n.safetensors", ".safetensors", "a.safetensors\n", "x" * 130 + ".safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_other_files(name: str, adapter: Path) -> None:
    (adapter / name).write_bytes(b"")
    with pytest.raises(AdapterRejected) as refusal:
        check_folder(adapter)
    assert ("convert it to safetensors" in refusal.value.message) == name.lower().endswith((".bin", ".pt", ".pkl"))


def test_pickle_only(adapter: Path) -> None:
    (adapter / TENSORS).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterRejected, match="pickle"):
        check_folder(adapter)


def test_links_folders_and_missing_files(adapter: Path) -> None:
    (adapter / "README.md").write_text("harmless")
    check_folder(adapter)
    (adapter / "LICENSE").symlink_to("/etc/passwd")
    with pytest.raises(AdapterRejected, match="symbolic link"):
        check_folder(adapter)
    (adapter / "LICENSE").unlink()
    (adapter / "b.safetensors").mkdir()
    with pytest.raises(AdapterRejected, match="regular file"):
        check_folder(adapter)
    (adapter / "b.safetensors").rmdir()
    os.mkfifo(adapter / "c.safetensors")
    with pytest.raises(AdapterRejected, match="regular file"):
        check_folder(adapter)
    (adapter / "c.safetensors").unlink()
    (adapter / TENSORS).unlink()
    with pytest.raises(AdapterRejected, match=TENSORS):
        check_folder(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(AdapterRejected, match=r"adapter_config\.json"):
        check_folder(adapter)


def test_a_tensor_in_two_files(adapter: Path) -> None:
    (adapter / "other.safetensors").write_bytes((adapter / TENSORS).read_bytes())
    with pytest.raises(AdapterRejected, match="in two files"):
        check_folder(adapter)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "not json": (b"{", "JSON"),
    "list": (b"[]", "not a JSON object"),
    "not utf-8": (b'{"a":"\xff"}', "UTF-8"),
    "nan": (b'{"peft_type":"LORA","r":NaN}', "NaN"),
    "infinity": (b'{"peft_type":"LORA","r":-Infinity}', "Infinity"),
    "overflow": (b'{"peft_type":"LORA","r":1e999}', "out of range"),
    "long integer": (b'{"peft_type":"LORA","r":' + b"9" * 5000 + b"}", "JSON"),
    "duplicate": (b'{"peft_type":"LORA","r":4,"r":8}', "twice"),
    "deep": (b'{"peft_type":"LORA","x":' + b"[" * 40 + b"]" * 40 + b"}", "deeper"),
    "very deep": (b"[" * 200_000 + b"]" * 200_000, "deeper"),
    "untyped": (b'{"r":4}', "peft_type"),
    "type of type": (b'{"peft_type":["LORA"]}', "string"),
    "adapterhub": (b'{"config":"pfeiffer","model_class":"X"}', "AdapterHub"),
    "architecture": (b'{"config":{"architecture":"xmod"}}', "AdapterHub's architecture 'xmod'.*served are"),
    "architecture of a list": (b'{"config":{"architecture":["lora"]}}', "AdapterHub's architecture"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_broken_configs(case: str, adapter: Path) -> None:
    raw, message = CONFIGS[case]
    (adapter / "adapter_config.json").write_bytes(raw)
    with pytest.raises(AdapterRejected, match=message):
        check_folder(adapter)


def test_huge_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(AdapterTooLarge, match=r"adapter_config\.json"):
        check_folder(adapter)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"peft_type": "WORA"}, "served are .*LORA"),
    "rank zero": ({"r": 0}, "'r'"),
    "rank negative": ({"r": -4}, "'r'"),
    "rank bool": ({"r": True}, "'r'"),
    "rank float": ({"r": 4.0}, "'r'"),
    "rank huge": ({"r": 4097}, "'r'"),
    "rank missing": ({"r": ...}, "no r"),
    "rank of tensors": ({"r": 8}, r"lora_A.*\(4, 32\).*\(8, 32\).*rank 8"),
    "rank by pattern": ({"rank_pattern": {"q_proj": 8}}, r"q_proj.*rank 8"),
    "rank pattern float": ({"rank_pattern": {"q_proj": 4.5}}, "rank_pattern"),
    "rank pattern list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "rank pattern bool": ({"rank_pattern": {"q_proj": True}}, "rank_pattern"),
    "alpha missing": ({"lora_alpha": ...}, "no lora_alpha"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha"),
    "alpha long": ({"lora_alpha": 10**400}, "lora_alpha"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora"),
    "dora without magnitudes": ({"use_dora": True}, "lora_magnitude_vector"),
    "bias": ({"bias": "some"}, "bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "random pissa": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "init number": ({"init_lora_weights": 1}, "init_lora_weights"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "unknown": ({"use_magic": True}, "use_magic"),
    "unknown object": ({"magic_config": {"a": None}}, "magic_config"),
    "path type": ({"base_model_name_or_path": ["/etc/passwd"]}, "base_model_name_or_path"),
    "lora_bias without tensors": ({"lora_bias": True}, r"lora_B\.bias"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_config_fields(case: str, adapter: Path, llama: nn.Module) -> None:
    changes, message = FIELDS[case]
    edit_config(adapter, **changes)
    with pytest.raises(AdapterRejected, match=message):
        compile_for(adapter, llama)


def test_fields_of_the_installed_peft_are_known(adapter: Path, llama: nn.Module) -> None:
    """Every default that PEFT writes is accepted, and an unknown field that is unset."""
    from peft import LoraConfig

    edit_config(adapter, **{**LoraConfig(r=4, lora_alpha=8).to_dict(), "future": None, "also": False, "more": []})
    compile_for(adapter, llama)


def test_a_backtracking_pattern_is_harmless(adapter: Path, llama: nn.Module) -> None:
    """q_proj gets its rank from a key that takes Python's re longer than the universe has time for."""
    edit_config(adapter, r=8, rank_pattern={"(([a-z._0-9]+)+)+#": 3, "((a|b|_|[c-z.0-9]+)+)+": 4})
    started = time.process_time()
    compile_for(adapter, llama)
    assert time.process_time() - started < 1


TENSOR_CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "shape of A": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 31)}), r"lora_A.*\(4, 31\)"),
    "shape of B": (lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(32, 5)}), r"lora_B.*\(32, 5\)"),
    "three dimensions": (lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(32, 4, 1)}), "lora_B"),
    "integers": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), "int8"),
    "A without B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), r"needs a tensor 'lora_B.weight'"),
    "B without A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), r"needs a tensor 'lora_A.weight'"),
    "no such module": (
        lambda t: t.update({"base_model.model.model.layers.9.q_proj.lora_A.weight": torch.ones(4, 32)}),
        r"layers\.9\.q_proj.*no such module",
    ),
    "left over": (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector"),
    "bias without lora_bias": (lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(32)}), r"lora_B\.bias"),
    "same twice": (lambda t: t.update({f"{Q0}.lora_A.default.weight": torch.ones(4, 32)}), "mean the same"),
    "embedding at a linear": (
        lambda t: t.update({f"{Q0}.lora_embedding_A": torch.ones(4, 32)}),
        "lora_embedding_A",
    ),
    "linear at an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 64)}),
        "lora_embedding_A",
    ),
    "no tensors": (lambda t: t.clear(), "no tensors"),
}


@pytest.mark.parametrize("case", TENSOR_CHANGES)
def test_tensors(case: str, adapter: Path, llama: nn.Module) -> None:
    change, message = TENSOR_CHANGES[case]
    edit_tensors(adapter, change)
    with pytest.raises(AdapterRejected, match=message):
        compile_for(adapter, llama)


def test_the_reason_of_the_base_is_passed_on(adapter: Path, llama: nn.Module) -> None:
    base = TinyBase(llama, refused={"model.layers.0.self_attn": "it is seen by half the tokens."})
    base.sites.pop("model.layers.0.self_attn.q_proj")
    with pytest.raises(AdapterRejected, match=r"q_proj, which cannot be adapted: it is seen by half the tokens\."):
        compile_folder(adapter, base, "d")


def test_copies_of_base_weights(adapter: Path, llama: nn.Module) -> None:
    head = llama.get_submodule("lm_head").weight
    key = "base_model.model.lm_head.base_layer.weight"
    edit_tensors(adapter, lambda t: t.update({key: head.clone()}))
    assert "lm_head" not in compile_folder(adapter, TinyBase(llama), "d").ops

    edit_tensors(adapter, lambda t: t[key][5].add_(1e-3))
    with pytest.raises(AdapterRejected, match=r"would be dropped.*lm_head\.weight"):
        compile_folder(adapter, TinyBase(llama), "d")
    edit_tensors(adapter, lambda t: t.update({"base_model.model.lm_head.weight": t.pop(key)}))
    rows = compile_folder(adapter, TinyBase(llama), "d").ops["lm_head"].extra[0]
    assert isinstance(rows, OutputRows)
    assert rows.index.tolist() == [5]
    edit_tensors(adapter, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(65, 32)}))
    with pytest.raises(AdapterRejected, match="resized"):
        compile_folder(adapter, TinyBase(llama), "d")


def test_the_register_refuses_duplicates_and_bad_names() -> None:
    assert "LORA" in {family.peft_type for family in families()}
    for name in ("LORA", "lora", "", "../X", "A" * 80):
        with pytest.raises(ValueError, match=r"regist|peft_type"):
            register(name, title="", paper="", instructions=(), cost="")
