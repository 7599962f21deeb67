"""Rotations, spectra and sparsity: layer by layer against PEFT at awkward sizes, and what is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from torch import Tensor, nn

from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.formats import compile_folder
from onebase.adapters.formats.wavelets import WAVELETS, filters
from onebase.adapters.program import SiteOps
from onebase.kernels.ops.instruction import Phase, RowInstruction

from .conftest import TinyBase, edit_config, edit_tensors

KEY = "base_model.model.q"


class _BlockDiagonal:
    """What BOFT's CUDA extension computes: with it PEFT builds butterflies."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


@pytest.fixture(autouse=True)
def _butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", _BlockDiagonal())


class OneLinear(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def saved(config: Any, folder: Path, width: int, out: int, amount: float = 0.3) -> tuple[TinyBase, nn.Module]:
    """A base of one linear module, and PEFT's module over it, saved to the folder."""
    torch.manual_seed(0)
    model = OneLinear(width, out)
    base = OneLinear(width, out)
    base.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * amount
        adapted.save_pretrained(folder)
    return TinyBase(base), adapted


def served(ops: SiteOps, base: TinyBase, x: Tensor) -> Tensor:
    """What the program makes of x, by the definitions of its instructions, in float64."""
    rows = [op for op in ops.extra if isinstance(op, RowInstruction)]
    phases = {phase: [op for op in rows if op.phase is phase] for phase in Phase}
    read = x + sum(op.reference(x) for op in phases[Phase.INPUT])
    y = read @ base.weight("q").double().T + base.bias("q").double()
    y = y + sum(op.reference(y) for op in phases[Phase.MAP]) + sum(op.reference(x) for op in phases[Phase.ADD])
    if ops.low_rank is not None:
        y = y + ops.low_rank.scale * x @ ops.low_rank.a.double().T @ ops.low_rank.b.double()
    return y if ops.add_out is None else y + ops.add_out.double()


Q = {"target_modules": ["q"]}
SIZES = ((47, 33), (48, 32), (32, 48))


def _each(
    make: Callable[..., Any], options: dict[str, list[Any]], sizes: Any = ((48, 32),)
) -> list[tuple[Any, int, int]]:
    """Every combination of options at every size."""
    combinations = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    return [(make(**Q, **chosen), width, out) for chosen in combinations for width, out in sizes]


LAYERS = [
    *_each(peft.OFTConfig, {"oft_block_size": [6], "num_cayley_neumann_terms": list(range(1, 9))}),
    *_each(
        peft.OFTConfig,
        {"oft_block_size": [2, 7, 48, 99], "use_cayley_neumann": [True, False], "block_share": [True, False]},
    ),
    *_each(
        peft.OFTConfig,
        {"oft_block_size": [0], "r": [1, 5, 7, 47, 100], "use_cayley_neumann": [False], "coft": [True], "eps": [0.5]},
    ),
    *_each(peft.BOFTConfig, {"boft_block_size": [4], "boft_n_butterfly_factor": [1, 2, 3]}),
    *_each(peft.BOFTConfig, {"boft_block_size": [0], "boft_block_num": [8], "boft_n_butterfly_factor": [1, 2, 4]}),
    *_each(peft.BOFTConfig, {"boft_block_size": [3]}, ((33, 47),)),
    *_each(peft.RoadConfig, {"variant": ["road_1", "road_2", "road_4"], "group_size": [2, 8, 32]}),
    *_each(peft.FourierFTConfig, {"n_frequency": [1, 200, 1536], "random_loc_seed": [777, 3], "scaling": [500.0]}),
    *_each(peft.FourierFTConfig, {"n_frequency": [1551], "scaling": [500.0]}, SIZES[:1]),
    *_each(peft.WaveFTConfig, {"n_frequency": [300], "wavelet_family": list(WAVELETS), "scaling": [3.0]}, SIZES),
    *_each(peft.WaveFTConfig, {"n_frequency": [300], "use_idwt": [False]}, SIZES),
    *_each(peft.C3AConfig, {"block_size": [1, 2, 16]}),
    *_each(peft.C3AConfig, {"block_size": [3, 15]}, ((45, 30),)),
    *_each(peft.ShiraConfig, {"r": [1, 7]}, SIZES),
    *_each(
        peft.SupertuningConfig,
        {
            "sparsity": [0.0, 0.9],
            "select_top": [True, False],
            "r": [None, 3],
            "save_precomputed_indices": [True, False],
        },
    ),
]
LAYERS += [(peft.IA3Config(**Q, feedforward_modules=modules), 48, 32) for modules in (["q"], [], "q")]


@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
@pytest.mark.parametrize(("config", "width", "out"), LAYERS)
def test_layer_equals_peft(config: Any, width: int, out: int, tmp_path: Path) -> None:
    base, adapted = saved(config, tmp_path, width, out)
    program = compile_folder(tmp_path, base, "d")
    x = torch.randn(9, width)
    with torch.no_grad():
        expected = adapted(x).double()
    got = served(program.ops["q"], base, x.double())
    scale = float(expected.abs().max())
    torch.testing.assert_close(got / scale, expected / scale, atol=2e-6, rtol=0)


def test_wavelets_are_orthonormal() -> None:
    """Even shifts of both filters, and the two among each other: what makes the transform invertible.

    But for PEFT's coif4, which is none: adapters were trained over it as it is.
    """
    for name in set(WAVELETS) - {"coif4"}:
        low, high = filters(name).double()
        assert float(low.sum()) == pytest.approx(2**0.5, abs=1e-6), name
        for shift in range(0, len(low), 2):
            moved = len(low) - shift
            products = [float(a[shift:] @ b[:moved]) for a, b in ((low, low), (high, high), (low, high), (high, low))]
            assert products == pytest.approx([float(shift == 0)] * 2 + [0.0] * 2, abs=1e-6), name


def test_wavelets_that_peft_cannot_build_are_refused(tmp_path: Path) -> None:
    """Most names on PEFT's list have no coefficients there; coif5's give a matrix of another size."""
    base, _ = saved(peft.WaveFTConfig(**Q, n_frequency=9), tmp_path, 48, 32)
    for name in sorted(set(WAVELET_REDUCTIONS) - set(WAVELETS)):
        config = peft.WaveFTConfig(**Q, n_frequency=9, wavelet_family=name)
        with pytest.raises((ValueError, RuntimeError)):
            peft.get_peft_model(OneLinear(48, 32), config)(torch.ones(1, 48))
        edit_config(tmp_path, wavelet_family=name)
        with pytest.raises(AdapterRejected, match="wavelet_family"):
            compile_folder(tmp_path, base, "d")


OFT = peft.OFTConfig(**Q, oft_block_size=8)
BOFT = peft.BOFTConfig(**Q, boft_block_size=4, boft_n_butterfly_factor=2)
ROAD = peft.RoadConfig(**Q, group_size=8)
FOURIER = peft.FourierFTConfig(**Q, n_frequency=9)
WAVE = peft.WaveFTConfig(**Q, n_frequency=9)
C3A = peft.C3AConfig(**Q, block_size=8)
SHIRA = peft.ShiraConfig(**Q, r=2)
SUPER = peft.SupertuningConfig(**Q, sparsity=0.9, r=2)
IA3 = peft.IA3Config(**Q, feedforward_modules=[])

FIELDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "before 0.14": (OFT, {"oft_block_size": ..., "r": 6}, "no oft_block_size"),
    "series of 0.17": (OFT, {"peft_version": "0.17.1"}, r"0\.18\.0.*retrained"),
    "series of a draft": (OFT, {"peft_version": "0.18.0.dev0@abc"}, r"0\.18\.0.*retrained"),
    "series of no version": (OFT, {"peft_version": None}, r"0\.18\.0.*retrained"),
    "series unsaid": (OFT, {"use_cayley_neumann": ...}, "use_cayley_neumann"),
    "both of r and size": (OFT, {"r": 6}, "exactly one"),
    "neither r nor size": (OFT, {"oft_block_size": 0}, "exactly one"),
    "other blocks": (OFT, {"oft_block_size": 16}, r"oft_R.*\(6, 28\).*\(3, 120\)"),
    "negative blocks": (OFT, {"oft_block_size": -8}, "oft_block_size"),
    "huge blocks": (OFT, {"oft_block_size": 1 << 40}, "oft_block_size"),
    "terms": (OFT, {"num_cayley_neumann_terms": 10**6}, "num_cayley_neumann_terms"),
    "coft text": (OFT, {"coft": "yes"}, "coft"),
    "oft of the future": (OFT, {"use_magic": True}, "use_magic"),
    "boft size": (BOFT, {"boft_block_size": 5}, "blocks .5 by the config. do not divide"),
    "boft factors": (BOFT, {"boft_n_butterfly_factor": 3}, r"boft_R.*\(3, 12, 4, 4\)"),
    "boft many factors": (BOFT, {"boft_n_butterfly_factor": 99}, "boft_n_butterfly_factor"),
    "boft both": (BOFT, {"boft_block_num": 2}, "exactly one"),
    "road variant": (ROAD, {"variant": "road_3"}, "road_1, road_2, road_4"),
    "road other variant": (ROAD, {"variant": "road_2"}, r"road_theta.*\(16,\).*\(32,\)"),
    "road odd group": (ROAD, {"group_size": 7}, "group_size 7"),
    "road group": (ROAD, {"group_size": 12}, "group_size 12"),
    "seed": (FOURIER, {"random_loc_seed": 1 << 63}, "random_loc_seed"),
    "seed text": (WAVE, {"random_loc_seed": "7"}, "random_loc_seed"),
    "no scaling": (FOURIER, {"scaling": ...}, "no scaling"),
    "wavelet text": (WAVE, {"wavelet_family": ["db1"]}, "wavelet_family"),
    "shira rank": (SHIRA, {"r": 3}, r"shira_indices.*\(2, 160\).*\(2, 240\)"),
    "super sparsity": (SUPER, {"sparsity": 0.8}, r"supertuning_values.*sparsity 0\.8"),
    "super all": (SUPER, {"sparsity": 1.0}, "below 1"),
    "super rank": (SUPER, {"r": 3}, r"lora_A.*\(2, 48\).*\(3, 48\)"),
    "super without its rank": (SUPER, {"r": None, "lora_alpha": None}, "supertuning_lora_A"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_config_fields(case: str, tmp_path: Path) -> None:
    config, changes, message = FIELDS[case]
    base, _ = saved(config, tmp_path, 48, 32)
    edit_config(tmp_path, **changes)
    with pytest.raises(AdapterRejected, match=message):
        compile_folder(tmp_path, base, "d")


def _set(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{KEY}.{name}": value})


def _drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{KEY}.{name}"]

    return change


def _index(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{KEY}.{name}"][at] = value

    return change


def _fraction(tensors: dict[str, Tensor]) -> None:
    tensors[f"{KEY}.shira_indices"] = tensors[f"{KEY}.shira_indices"].float() + 0.5


TENSORS: dict[str, tuple[Any, Callable[[dict[str, Tensor]], None], str]] = {
    "oft of 0.15": (OFT, _set("oft_r.weight", torch.ones(3)), "oft_r"),
    "oft of an embedding": (OFT, _set("oft_embedding_R.weight", torch.ones(6, 28)), "is an embedding's"),
    "boft shape": (BOFT, _set("boft_R", torch.ones(12, 4, 4)), "boft_R"),
    "boft scalar": (BOFT, _set("boft_R", torch.tensor(1.0)), "boft_R"),
    "boft without scale": (BOFT, _drop("boft_s"), "needs a tensor 'boft_s'"),
    "boft without blocks": (BOFT, _drop("boft_R"), "needs a tensor 'boft_R'"),
    "road half": (ROAD, _drop("road_alpha"), "needs a tensor 'road_alpha'"),
    "ia3 shape": (IA3, _set("ia3_l", torch.ones(48, 1)), r"ia3_l.*\(48, 1\).*\(32, 1\).*\(1, 48\) for a feed-forward"),
    "ia3 scalar": (IA3, _set("ia3_l", torch.tensor(1.0)), "ia3_l"),
    "too many coefficients": (FOURIER, _set("fourierft_spectrum", torch.ones(1537)), "1 to 1536"),
    "no coefficient": (WAVE, _set("waveft_spectrum", torch.ones(0)), "1 to 1536"),
    "coefficients in a matrix": (WAVE, _set("waveft_spectrum", torch.ones(3, 3)), "1 to 1536"),
    "c3a block": (C3A, _set("c3a_kernel", torch.ones(4, 6, 7)), "blocks of 7 do not fit"),
    "c3a empty": (C3A, _set("c3a_kernel", torch.ones(4, 6, 0)), "blocks of 0 do not fit"),
    "c3a blocks": (C3A, _set("c3a_kernel", torch.ones(6, 4, 8)), r"c3a_kernel.*\(4, 6, 8\)"),
    "row out of bounds": (SHIRA, _index("shira_indices", (0, 3), 32), "indices outside 0 to 31"),
    "column out of bounds": (SHIRA, _index("shira_indices", (1, 3), 48), "indices outside 0 to 47"),
    "negative index": (SHIRA, _index("shira_indices", (1, 3), -1), "indices outside"),
    "index between": (SHIRA, _fraction, "no whole numbers"),
    "index of bool": (SHIRA, _set("shira_indices", torch.ones(2, 160, dtype=torch.bool)), "bool; integers"),
    "shira half": (SHIRA, _drop("shira_indices"), "needs a tensor 'shira_indices'"),
    "super place": (SUPER, _index("supertuning_indices", (0,), 1536), "indices outside 0 to 1535"),
    "super half": (SUPER, _drop("supertuning_lora_B.weight"), "needs a tensor 'supertuning_lora_B.weight'"),
    "super without indices": (SUPER, _drop("supertuning_indices"), "needs a tensor 'supertuning_indices'"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, tmp_path: Path) -> None:
    config, change, message = TENSORS[case]
    base, _ = saved(config, tmp_path, 48, 32)
    edit_tensors(tmp_path, change)
    with pytest.raises(AdapterRejected, match=message):
        compile_folder(tmp_path, base, "d")


def test_one_factor_is_served_whatever_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT without its CUDA extension trains and saves one factor, and loads it again."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)
    base, adapted = saved(BOFT, tmp_path, 48, 32)
    x = torch.randn(3, 48)
    got = served(compile_folder(tmp_path, base, "d").ops["q"], base, x.double())
    torch.testing.assert_close(got, adapted(x).detach().double(), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
def test_ties_have_no_order(tmp_path: Path) -> None:
    config = peft.SupertuningConfig(**Q, sparsity=0.9, save_precomputed_indices=False)
    base, _ = saved(config, tmp_path, 48, 32)
    weight = base.model.q.weight.data
    flat = weight.view(-1)
    first, second = torch.topk(flat.abs(), 2).indices
    flat[second] = -flat[first]
    with pytest.raises(AdapterRejected, match="tie in magnitude"):
        compile_folder(tmp_path, base, "d")
    edit_config(tmp_path, select_top=False)
    compile_folder(tmp_path, base, "d")


def test_places_are_drawn_from_matrices_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = saved(WAVE, tmp_path, 48, 32)
    monkeypatch.setattr("onebase.adapters.formats.locations.MAX_PLACES", 1535)
    with pytest.raises(AdapterTooLarge, match="1536 weights"):
        compile_folder(tmp_path, base, "d")


@pytest.mark.parametrize("config", [OFT, peft.BOFTConfig(**Q, boft_block_size=8)], ids=lambda c: c.peft_type)
def test_blocks_are_of_a_bounded_size(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = saved(config, tmp_path, 48, 32)
    monkeypatch.setattr("onebase.adapters.formats.peft.oft.MAX_BLOCK_SIZE", 7)
    with pytest.raises(AdapterTooLarge, match="q is rotated in blocks of 8; at most 7"):
        compile_folder(tmp_path, base, "d")


@pytest.mark.parametrize("config", [OFT, BOFT, ROAD, FOURIER, WAVE, C3A, SHIRA, SUPER, IA3], ids=lambda c: c.peft_type)
def test_no_dense_matrix_is_made(config: Any, tmp_path: Path) -> None:
    """What is held is smaller than the weight, which these families exist for."""
    base, _ = saved(config, tmp_path, 48, 32)
    assert compile_folder(tmp_path, base, "d").num_elements < 48 * 32
