"""LLM-Adapters' bottlenecks equal their recomputation by hooks on linear modules, written from the formulas alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .case import ALL_FIVE
from .recomputed import Draw, check_served, drawn, load

RANK = 6
INPUT, OUTPUT = ("gate_proj", "up_proj", "fc1"), ("down_proj", "fc2")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "silu": lambda x: x / (1 + (-x).exp()),
}


@dataclass(frozen=True)
class Case:
    """targets: ends of module paths. biases: which modules' biases are trained too."""

    name: str
    targets: tuple[str, ...]
    architectures: tuple[str, ...]
    fields: dict[str, Any]
    biases: tuple[str, ...] = ()

    def write(self, model: nn.Module, folder: Path) -> None:
        draw = drawn(len(self.name))
        tensors: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path.endswith(self.targets):
                tensors |= self._module(f"base_model.model.{path}", path, module, draw)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor) and self.biases and path.endswith(self.biases):
                tensors[f"base_model.model.{path}.bias"] = bias + draw(*bias.shape)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "BOTTLENECK", "bottleneck_size": RANK, "target_modules": list(self.targets)}
        config |= {"bias": "all" if self.biases else "none", "adapter_dropout": 0.1, "init_weights": "bert"}
        config |= {"use_adapterp": False, "scaling": 1.0, "use_parallel_adapter": False, "modules_to_save": None}
        (folder / "adapter_config.json").write_text(json.dumps(config | self.fields))

    def _module(self, key: str, path: str, module: nn.Linear, draw: Draw) -> dict[str, Tensor]:
        parallel = self.fields.get("use_parallel_adapter", False)
        width = module.out_features if path.endswith(OUTPUT) and not parallel else module.in_features
        out = module.in_features if path.endswith(INPUT) and not parallel else module.out_features
        tensors = {f"{key}.adapter_down.weight": draw(RANK, width), f"{key}.adapter_up.weight": draw(out, RANK)}
        return tensors if self.fields.get("scaling") != "learned" else tensors | {f"{key}.adapter_scaling": draw(1) + 1}


SERIES = {"non_linearity": "tanh"}
PARALLEL = {"use_parallel_adapter": True, "scaling": "learned", "non_linearity": "relu"}
CASES = [
    Case("adapter-h", ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"), ("llama", "opt"), SERIES | {"scaling": 2.0}),
    Case("adapter-p", OUTPUT, ("llama", "opt"), SERIES | {"use_adapterp": True}),
    # GPT-2 has no nn.Linear inside, and the library adapts nothing else.
    Case("parallel", ("q_proj", "v_proj", "up_proj", "fc2"), tuple(a for a in ALL_FIVE if a != "gpt2"), PARALLEL),
    Case(
        "input-and-bias",
        INPUT,
        ("llama", "opt"),
        {"non_linearity": "silu"},
        biases=("q_proj", "up_proj", "norm", "fc1"),
    ),
]
RUNS = [(case, architecture) for case in CASES for architecture in case.architectures]


@contextmanager
def applied(folder: Path, model: nn.Module) -> Iterator[dict[str, Any]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for key, tensor in tensors.items():
            path, _, name = key.removeprefix("base_model.model.").rpartition(".")
            if name == "bias":
                modules[path].bias.data = tensor
            elif key.endswith("adapter_down.weight"):
                _hook(config, tensors, path.removesuffix(".adapter_down"), modules, stack)
        yield {}


def _hook(config: dict[str, Any], tensors: dict[str, Tensor], path: str, modules: Any, stack: ExitStack) -> None:
    key = f"base_model.model.{path}"
    scale = tensors.get(f"{key}.adapter_scaling", config["scaling"])

    def f(x: Tensor) -> Tensor:
        inner = ACTS[config["non_linearity"]](x @ tensors[f"{key}.adapter_down.weight"].T)
        return inner @ tensors[f"{key}.adapter_up.weight"].T * scale

    module = modules[path]
    if config["use_parallel_adapter"]:
        handle = module.register_forward_hook(lambda m, args, y: y + f(args[0]))
    elif path.endswith(INPUT):
        handle = module.register_forward_pre_hook(lambda m, args: (args[0] + f(args[0]),))
    else:
        handle = module.register_forward_hook(lambda m, args, y: y + f(y))
    stack.callback(handle.remove)


@pytest.mark.parametrize(("case", "architecture"), RUNS, ids=[f"{case.name}-{name}" for case, name in RUNS])
def test_bottleneck_equals_its_recomputation(
    case: Case,
    architecture: str,
    checkpoint: Callable[..., Path],
    driver_of: Callable[[str], Any],
    families_cache: Path,
    tmp_path: Path,
) -> None:
    base, folder = checkpoint(architecture), tmp_path / case.name
    case.write(load(base), folder)
    driver = driver_of(architecture)
    check_served(driver, base, architecture, folder, functools.partial(applied, folder), families_cache / "recomputed")
