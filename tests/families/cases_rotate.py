"""OFT, BOFT, ROAD, IA3, FOURIERFT, WAVEFT, C3A, SHIRA, SUPERTUNING."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .case import TARGETS, Case, Move, move_trainable

# GPT-2's modules are Conv1D, which PEFT adapts by IA3, FOURIERFT and WAVEFT only.
LINEAR = ("llama", "qwen3", "gemma2", "opt")
EMBEDDINGS = {"gpt2": "wte"}
NORMS = {"opt": "self_attn_layer_norm"}


class _BlockDiagonal:
    """What BOFT's CUDA extension computes. With it PEFT builds butterflies, and tries to compile nothing."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


boft_layer._FBD_CUDA = _BlockDiagonal()


def _moved(amount: float) -> Move:
    """Values that start at zero and have small effects, or large ones."""

    def move(model: nn.Module, generator: torch.Generator) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * amount

    return move


def _oft(**options: Any) -> Callable[[str], Any]:
    return lambda name: peft.OFTConfig(target_modules=TARGETS[name], **options)


def _oft_tokens(name: str) -> Any:
    return peft.OFTConfig(target_modules=[EMBEDDINGS.get(name, "embed_tokens")], oft_block_size=16)


def _oft_saved(name: str) -> Any:
    saved = ["v_proj", NORMS.get(name, "norm")]
    return peft.OFTConfig(target_modules=["q_proj"], oft_block_size=16, modules_to_save=saved)


def _boft(**options: Any) -> Callable[[str], Any]:
    return lambda name: peft.BOFTConfig(target_modules=TARGETS[name], **options)


def _road(variant: str) -> Callable[[str], Any]:
    return lambda name: peft.RoadConfig(target_modules=TARGETS[name], variant=variant, group_size=8)


def _feedforward(name: str) -> list[str]:
    return {"gpt2": ["mlp.c_proj"], "opt": ["fc2"]}.get(name, ["down_proj"])


def _ia3(name: str) -> Any:
    targets = ["attn.c_attn", "mlp.c_proj"] if name == "gpt2" else TARGETS[name]
    return peft.IA3Config(target_modules=targets, feedforward_modules=_feedforward(name))


def _fourier(scaling: float, **options: Any) -> Callable[[str], Any]:
    """Larger scales would measure the rounding of PEFT: at 300 it is 3e-4 from itself in float64 on OPT."""
    return lambda name: peft.FourierFTConfig(target_modules=TARGETS[name], scaling=scaling, **options)


def _wave(**options: Any) -> Callable[[str], Any]:
    return lambda name: peft.WaveFTConfig(target_modules=TARGETS[name], **options)


def _shira(**options: Any) -> Callable[[str], Any]:
    return lambda name: peft.ShiraConfig(target_modules=TARGETS[name], **options)


def _float_indices(folder: Path) -> None:
    """As PEFT on Windows writes them."""
    file = folder / "adapter_model.safetensors"
    tensors = {key: value.float() if "indices" in key else value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _super(**options: Any) -> Callable[[str], Any]:
    return lambda name: peft.SupertuningConfig(target_modules=TARGETS[name], **options)


CASES = [
    Case("oft-neumann", _oft(oft_block_size=16), LINEAR),
    Case("oft-neumann-2-terms", _oft(oft_block_size=8, num_cayley_neumann_terms=2), ("llama",)),
    Case("oft-neumann-3-terms", _oft(oft_block_size=8, num_cayley_neumann_terms=3), ("llama",)),
    Case("oft-neumann-4-terms", _oft(oft_block_size=8, num_cayley_neumann_terms=4), ("llama",)),
    Case("oft-cayley-shared", _oft(oft_block_size=8, use_cayley_neumann=False, block_share=True), LINEAR),
    # 5 blocks divide nothing: PEFT takes 4. eps bounds some blocks and leaves others.
    Case("oft-r-coft", _oft(r=5, oft_block_size=0, use_cayley_neumann=False, coft=True, eps=2.5), LINEAR),
    Case("oft-size-adjusted", _oft(oft_block_size=20, coft=True, eps=0.5, block_share=True), LINEAR),
    Case("oft-tokens", _oft_tokens),
    Case("oft-saved", _oft_saved, LINEAR),
    Case("boft-bias", _boft(boft_block_size=8, bias="boft_only"), ("llama", "opt"), _moved(0.2)),
    Case("boft-one", _boft(boft_block_size=8), LINEAR, _moved(0.2)),
    Case("boft-butterfly", _boft(boft_block_num=8, boft_block_size=0, boft_n_butterfly_factor=3), LINEAR, _moved(0.2)),
    Case("boft-two", _boft(boft_block_size=4, boft_n_butterfly_factor=2), ("llama",), _moved(0.2)),
    Case("road-1", _road("road_1"), LINEAR),
    Case("road-2", _road("road_2"), LINEAR),
    Case("road-4", _road("road_4"), LINEAR),
    Case("ia3", _ia3),
    Case("fourierft", _fourier(n_frequency=200, scaling=30.0), move=_moved(1.0)),
    Case(
        "fourierft-pattern",
        _fourier(n_frequency=300, scaling=60.0, random_loc_seed=5, n_frequency_pattern={"q_proj": 17}),
        ("llama", "opt"),
        _moved(1.0),
    ),
    Case("waveft-haar", _wave(n_frequency=150, scaling=2.0), move=_moved(0.3)),
    *(
        Case(f"waveft-{wavelet}", _wave(n_frequency=150, scaling=2.0, wavelet_family=wavelet), ("llama",), _moved(0.3))
        for wavelet in ("db3", "db10", "sym4", "sym9", "coif1", "coif4")
    ),
    Case("waveft-sparse", _wave(n_frequency=100, use_idwt=False, random_loc_seed=9), move=_moved(0.02)),
    Case("waveft-proportional", _wave(n_frequency=150, scaling=2.0, proportional_parameters=True), move=_moved(0.3)),
    Case("c3a", lambda name: peft.C3AConfig(target_modules=TARGETS[name], block_size=8), LINEAR, _moved(1.0)),
    Case(
        "c3a-pattern",
        lambda name: peft.C3AConfig(
            target_modules=TARGETS[name], block_size=16, block_size_pattern={"q_proj": 4}, bias="all"
        ),
        ("llama",),
        _moved(1.0),
    ),
    Case("shira", _shira(r=4), LINEAR),
    Case("shira-windows", _shira(r=2), ("llama",), edit=_float_indices),
    Case("supertuning", _super(sparsity=0.9), LINEAR),
    Case("supertuning-lora", _super(sparsity=0.95, r=4, lora_alpha=6.0, select_top=False), LINEAR, move_trainable),
    Case("supertuning-chosen", _super(sparsity=0.97, r=3, save_precomputed_indices=False), LINEAR),
]
