"""Tiny base models, adapters made by HF PEFT, and a plain-torch executor of programs."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from onebase.adapters.base import Experts, Site, SiteKind
from onebase.adapters.program import AdapterProgram
from onebase.adapters.registry import Registry

torch.set_num_threads(1)
VOCABULARY = 64


class TinyBase:
    """BaseModel over a transformers model: every linear, Conv1D, embedding and norm is a site."""

    fingerprint = "tiny"
    experts: Mapping[str, Experts] = {}

    def __init__(self, model: nn.Module, refused: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.refused = dict(refused or {})
        self.sites = {path: site for path, module in model.named_modules() if (site := _site(path, module))}
        for path in self.refused:
            self.sites.pop(path, None)

    def weight(self, path: str) -> Tensor:
        module = self.model.get_submodule(path)
        return module.weight.T if isinstance(module, Conv1D) else module.weight

    def bias(self, path: str) -> Tensor | None:
        return getattr(self.model.get_submodule(path), "bias", None)

    def tied(self, path: str) -> tuple[str, ...]:
        mine = self.model.get_submodule(path).weight
        return tuple(p for p in self.sites if p != path and self.model.get_submodule(p).weight is mine)

    @property
    def config(self) -> dict[str, Any]:
        return self.model.config.to_dict()


def _site(path: str, module: nn.Module) -> Site | None:
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "embed_scale", 1.0))
        return Site(path, SiteKind.EMBEDDING, module.num_embeddings, module.embedding_dim, scale)
    if isinstance(module, nn.Linear):
        return Site(path, SiteKind.LINEAR, module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return Site(path, SiteKind.LINEAR, *module.weight.shape)
    if type(module).__name__.endswith("Norm"):
        return Site(path, SiteKind.NORM, module.weight.numel(), module.weight.numel())
    return None


@contextmanager
def executed(model: nn.Module, program: AdapterProgram) -> Iterator[None]:
    """The program's operations in plain torch, as hooks on the base's own modules."""
    handles = []
    for path, ops in program.ops.items():

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, ops: Any = ops) -> Tensor:
            x = args[0]
            if (op := ops.low_rank) is not None:
                out = out + op.scale * (x @ op.a.float().T) @ op.b.float()
            if (op := ops.token_low_rank) is not None:
                out = out + op.scale * (op.a.float()[x] @ op.b.float())
            return out if ops.add_out is None else out + ops.add_out

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


def _gemma() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )
    return transformers.Gemma3ForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": _llama, "gpt2": _gpt2, "gemma": _gemma}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too: zeros would hide a mistake
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def save_lora(model: nn.Module, path: Path, **options: Any) -> None:
    """Write a LoRA adapter with PEFT, all factors random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(path)


def load_peft(model: nn.Module, path: Path) -> nn.Module:
    """What PEFT itself makes of the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()


def edit_config(path: Path, **changes: Any) -> None:
    """Set fields; ``...`` removes one."""
    file = path / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    return make_model("llama")


@pytest.fixture
def adapter(tmp_path: Path, llama: nn.Module) -> Path:
    """A sound adapter of rank 4 on q_proj and v_proj of the tiny Llama, to be broken by tests."""
    path = tmp_path / "adapter"
    path.mkdir()
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        for module, out in (("q_proj", 32), ("v_proj", 16)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, 32)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def other(adapter: Path, tmp_path: Path) -> Path:
    """Another sound adapter."""
    path = tmp_path / "other"
    shutil.copytree(adapter, path)
    edit_tensors(path, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder to be."""
    return tmp_path / "data"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    registry = Registry(root, "base")
    yield registry
    registry.close()


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for LD_PRELOAD that makes the disk fail: see faults.c."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).parent / "faults.c"
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library
