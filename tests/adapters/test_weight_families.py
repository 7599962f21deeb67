"""Families that read the base's weight: what is refused, how small the operations are, what PEFT has no oracle for."""

from __future__ import annotations

import copy
import functools
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder
from onebase.adapters.formats.spectral_basis import seeded_svd
from onebase.adapters.program import AdapterProgram
from onebase.kernels.ops.dense import Dense

from .conftest import TinyBase, edit_config, edit_tensors, make_model

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
PATH = "model.layers.0.self_attn.q_proj"
TARGETS = ["q_proj", "v_proj"]  # 32 to 32 and 32 to 16, with biases
CONFIGS: dict[str, Callable[[], Any]] = {
    "miss": lambda: peft.MissConfig(r=6, target_modules=TARGETS),
    "mini": lambda: peft.MissConfig(r=6, mini_r=4, init_weights="mini", target_modules=TARGETS),
    "bat": lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=TARGETS),
    "hra": lambda: peft.HRAConfig(r=3, target_modules=TARGETS),
    "deft": lambda: peft.DeftConfig(r=3, target_modules=TARGETS),
    "peanut": lambda: peft.PeanutConfig(r=3, depth=1, target_modules=TARGETS),
    "psoft": lambda: peft.PsoftConfig(r=3, target_modules=TARGETS),
    "osf": lambda: peft.OSFConfig(effective_rank=14, target_modules=TARGETS),
    "adamss": lambda: peft.AdamssConfig(r=6, num_subspaces=2, subspace_rank=2, target_modules=TARGETS),
    "frod": lambda: peft.FrodConfig(progressbar=False, target_modules=TARGETS),
}


def _save(model: nn.Module, config: Any, path: Path) -> Path:
    """Write an adapter with PEFT, every trainable weight moved."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * 0.1
        adapted.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, llama: nn.Module) -> Callable[[str], Path]:
    """sound(name) -> an adapter of the family, made once."""
    return functools.cache(lambda name: _save(llama, CONFIGS[name](), tmp_path_factory.mktemp(name)))


@pytest.fixture
def saved(tmp_path: Path, sound: Callable[[str], Path]) -> Callable[[str], Path]:
    """saved(name) -> a copy of a sound adapter, to be broken."""
    return lambda name: Path(shutil.copytree(sound(name), tmp_path / name))


def compiled(path: Path, model: nn.Module) -> AdapterProgram:
    return compile_folder(path, TinyBase(model), "digest")


def _renamed(suffix: str, other: str, key: str = Q0) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{key}.{other}"] = tensors.pop(f"{key}.{suffix}")

    return change


def _set(suffix: str, value: Callable[[Tensor], Tensor], key: str = Q0) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{key}.{suffix}"] = value(tensors[f"{key}.{suffix}"]).contiguous()

    return change


def _dropped(suffix: str, key: str = Q0) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{key}.{suffix}"]

    return change


def _overflow(tensors: dict[str, Tensor]) -> None:
    for name in ("vector_a", "vector_b"):
        tensors[f"{Q0}.psoft_R.{name}"] *= 1e30


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("miss", {"r": 0}, "r.*from 1"),
    ("miss", {"r": 33}, "has 32 inputs"),
    ("miss", {"r": 5}, r"must be \(5, 32\)"),
    ("miss", {"init_weights": "other"}, "'bat', 'mini' exist"),
    ("mini", {"mini_r": 3}, "mini_r must divide"),
    ("mini", {"mini_r": 0}, "mini_r.*from 1"),
    ("bat", {"r": 6}, "must divide both widths"),
    ("bat", {"r": 4}, r"must be \(8, 4, 4\)"),
    ("hra", {"r": 1 << 40}, "r.*from 1"),
    ("hra", {"r": 2}, r"must be \(32, 2\)"),
    ("deft", {"decomposition_method": "svd"}, "'relu' and 'qr' exist"),
    ("deft", {"para": True}, "deft_R.*no meaning"),
    ("deft", {"r": 4}, r"must be \(32, 4\)"),
    ("peanut", {"act_fn": "prelu"}, "act_fn.*served are"),
    ("peanut", {"act_fn": "../x"}, "act_fn.*served are"),
    ("peanut", {"depth": 1 << 30}, "depth.*from 0"),
    ("peanut", {"depth": 0}, "has no such module"),
    ("peanut", {"depth": 2}, r"needs a tensor 'peanut_encoders\.1\.weight'"),
    ("psoft", {"r": 33}, "has 32 inputs, 32 outputs"),
    ("psoft", {"psoft_alpha": 0}, "psoft_alpha"),
    ("psoft", {"psoft_svd": "fast"}, "'full' and 'lowrank' exist"),
    ("psoft", {"ab_svd_init": "x"}, "'pissa_init' exist"),
    ("psoft", {"psoft_orth": False}, r"must be \(3, 3\)"),
    ("psoft", {"psoft_mag_a": False}, "vector_a.*no meaning"),
    ("psoft", {"psoft_svd": "lowrank", "random_seed": ...}, "has no random_seed"),
    ("psoft", {"use_cayley_neumann": True, "num_cayley_neumann_terms": 10**6}, "num_cayley_neumann_terms"),
    ("psoft", {"use_cayley_neumann": True, "cayley_neumann_eps": 1.5}, "cayley_neumann_eps"),
    ("psoft", {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 10**6}, "psoft_svd_lowrank_niter"),
    ("adamss", {"num_subspaces": 10**6}, "num_subspaces.*from 1"),
    ("adamss", {"num_subspaces": 3}, r"adamss_A\.2|must be"),
    ("adamss", {"r": 5}, r"adamss_newB.*must be \(5, 33\)"),
    ("adamss", {"random_seed": 1}, "clusters cannot be computed again"),
    ("frod", {"save_projection": False}, "no meaning"),
    ("frod", {"sparse_rate": 2}, "sparse_rate"),
    ("frod", {"save_projection": False, "regularization_alpha": 0}, "regularization_alpha"),
    ("frod", {"unknown": 1}, "unknown and set"),
]


@pytest.mark.parametrize(("name", "changes", "message"), FIELDS, ids=lambda value: str(value)[:40])
def test_refused_fields(
    name: str, changes: dict[str, Any], message: str, saved: Callable[[str], Path], llama: nn.Module
) -> None:
    path = saved(name)
    compiled(path, llama)
    edit_config(path, **changes)
    with pytest.raises(AdapterRejected, match=message):
        compiled(path, llama)


GLOBAL = "base_model"
TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], None], str]] = [
    ("miss", _set("miss_block", lambda t: t[:, :-1]), r"must be \(6, 32\)"),
    ("miss", _renamed("miss_block", "miss_other"), "no meaning"),
    ("hra", _set("hra_u", torch.zeros_like), "is zero"),
    ("hra", _set("hra_u", lambda t: t.int()), "dtype"),
    ("deft", _dropped("deft_R"), "needs a tensor 'deft_R'"),
    ("deft", _dropped("deft_P"), "needs a tensor 'deft_P'"),
    ("peanut", _dropped("peanut_decoders.0.weight"), "needs a tensor 'peanut_decoders"),
    ("peanut", _set("peanut_A.weight", lambda t: t.T), r"must be \(3, 32\)"),
    ("psoft", _dropped("psoft_R.vector_b"), "needs a tensor 'psoft_R.vector_b'"),
    ("psoft", _set("psoft_R.weight", lambda t: t[:-1]), r"must be \(3,\)"),
    ("psoft", _overflow, "finite"),
    ("osf", _dropped("osf_svd_params.V_low"), "needs a tensor 'osf_svd_params.V_low'"),
    ("osf", _set("osf_svd_params.S_low", lambda t: torch.ones(32)), "at most 31"),
    ("osf", _set("osf_svd_params.U_low", lambda t: t[:, 1:]), "must be"),
    ("adamss", _dropped("adamss_newB"), "needs a tensor 'adamss_newB'"),
    ("adamss", _dropped("adamss_B.1"), r"needs a tensor 'adamss_B\.1'"),
    ("adamss", _set("adamss_B.0", lambda t: t[1:]), "size of the cluster"),
    ("adamss", _set("adamss_A.0", lambda t: t.flatten()), "must be"),
    ("frod", _dropped("frod_lambda_l"), "needs a tensor 'frod_lambda_l'"),
    ("frod", _set("frod_lambda_s_values", lambda t: t[1:]), "as many as"),
    ("frod", _dropped("frod_V.self_attn_q_proj", GLOBAL), "needs a tensor 'base_model.frod_V"),
    ("frod", _dropped("frod_s_indices.self_attn_q_proj", GLOBAL), "needs a tensor 'base_model.frod_s_indices"),
    ("frod", _set("frod_s_indices.self_attn_q_proj", lambda t: t + 32, GLOBAL), "from 0 to 31"),
    ("frod", _set("frod_s_indices.self_attn_q_proj", lambda t: t - 32, GLOBAL), "from 0 to 31"),
    ("frod", _set("frod_s_indices.self_attn_q_proj", lambda t: t[:, 0], GLOBAL), "must be"),
    ("frod", _set("frod_s_indices.self_attn_q_proj", lambda t: t.float(), GLOBAL), "integers are expected"),
    ("frod", _set("frod_s_size.self_attn_q_proj", lambda t: t * 1000, GLOBAL), r"must be \[32, 32\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS, ids=[f"{n}-{m}"[:40] for n, _, m in TENSORS])
def test_refused_tensors(
    name: str,
    change: Callable[[dict[str, Tensor]], None],
    message: str,
    saved: Callable[[str], Path],
    llama: nn.Module,
) -> None:
    path = saved(name)
    edit_tensors(path, change)
    with pytest.raises(AdapterRejected, match=message):
        compiled(path, llama)


@pytest.mark.parametrize("name", CONFIGS)
def test_other_kinds_of_modules_are_refused(name: str, saved: Callable[[str], Path], llama: nn.Module) -> None:
    path = saved(name)

    def move(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(Q0)]:
            tensors[key.replace(Q0, "base_model.model.model.embed_tokens")] = tensors.pop(key)

    edit_tensors(path, move)
    with pytest.raises(AdapterRejected, match=r"embed_tokens.* adapts (a|linear)"):
        compiled(path, llama)


def test_dependent_reflections_are_refused_with_apply_gs_only(saved: Callable[[str], Path], llama: nn.Module) -> None:
    path = saved("hra")
    edit_tensors(path, _set("hra_u", lambda t: t[:, :1].expand(-1, 3)))
    compiled(path, llama)
    edit_config(path, apply_GS=True)
    with pytest.raises(AdapterRejected, match="depend on each other"):
        compiled(path, llama)


RANKS = {"miss": 6, "mini": 6, "hra": 3, "deft": 3, "peanut": 3, "psoft": 3, "adamss": 4}


@pytest.mark.parametrize("name", RANKS)
def test_ranks_are_exact(name: str, saved: Callable[[str], Path], llama: nn.Module) -> None:
    program = compiled(saved(name), llama)
    assert {op.rank for op in program.ops.values()} == {RANKS[name]}
    assert all(not op.extra for op in program.ops.values())


@pytest.mark.parametrize("effective_rank", [30, 14])
def test_osf_is_low_rank_or_dense_whichever_is_smaller(effective_rank: int, tmp_path: Path, llama: nn.Module) -> None:
    config = peft.OSFConfig(effective_rank=effective_rank, target_modules=["q_proj"])
    op = compiled(_save(llama, config, tmp_path), llama).ops[PATH]
    if effective_rank == 30:
        assert op.rank == 4
        assert op.extra == ()
    else:
        assert op.low_rank is None
        assert [type(item) for item in op.extra] == [Dense]


@pytest.mark.parametrize("name", ["miss", "bat"])
def test_bone_is_miss_under_its_old_names(name: str, saved: Callable[[str], Path], llama: nn.Module) -> None:
    path = saved(name)
    expected = list(compiled(path, llama).ops[PATH].tensors())
    edit_config(path, peft_type="BONE", mini_r=..., miss_dropout=..., bias=...)

    def rename(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".miss_", ".bone_")] = tensors.pop(key)

    edit_tensors(path, rename)
    program = compiled(path, llama)
    assert program.family == "BONE"
    for got, want in zip(program.ops[PATH].tensors(), expected, strict=True):
        assert torch.equal(got, want)
    edit_config(path, init_weights="mini")
    with pytest.raises(AdapterRejected, match="true, false and 'bat' exist"):
        compiled(path, llama)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24)], ids=str)
def test_seeded_svd_is_torchs_and_leaves_the_global_generator_alone(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        u, s, v = torch.svd_lowrank(weight, q=6, niter=3)
    before = torch.get_rng_state()
    got = seeded_svd(weight, 6, iterations=3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    for part, expected in zip(got, (u, s, v.T), strict=True):
        torch.testing.assert_close(part, expected, atol=0, rtol=0)


def test_adamss_of_another_base_is_refused(saved: Callable[[str], Path], llama: nn.Module) -> None:
    path = saved("adamss")
    other = copy.deepcopy(llama)
    generator = torch.Generator().manual_seed(9)
    for parameter in other.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    with pytest.raises(AdapterRejected, match="belongs to another base"):
        compiled(path, other)


def test_adamss_without_scikit_learn_is_refused(
    saved: Callable[[str], Path], llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("adamss")
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(AdapterRejected, match=r"onebase\[adamss\]"):
        compiled(path, llama)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bfloat16_base_is_read_in_float32(name: str, saved: Callable[[str], Path], llama: nn.Module) -> None:
    """The base's weights are rounded, and nothing else is."""
    path = saved(name)
    rounded = copy.deepcopy(llama).bfloat16()
    if name == "adamss":
        edit_tensors(path, _as_bfloat16)
    program = compiled(path, rounded)
    assert all(t.dtype in (torch.float32, torch.int32) for op in program.ops.values() for t in op.tensors())
    assert all(bool(torch.isfinite(t).all()) for op in program.ops.values() for t in op.tensors())


def _as_bfloat16(tensors: dict[str, Tensor]) -> None:
    """The projection in the base's dtype, as PEFT saves it."""
    for key in [key for key in tensors if key.endswith("newB")]:
        tensors[key] = tensors[key].bfloat16()


def test_conv1d_weights_are_read_in_their_logical_order(tmp_path: Path) -> None:
    gpt2 = make_model("gpt2")
    config = peft.DeftConfig(r=3, target_modules=["c_attn"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(copy.deepcopy(gpt2), config).save_pretrained(tmp_path)
    op = compiled(tmp_path, gpt2).ops["transformer.h.0.attn.c_attn"].low_rank
    assert op is not None
    assert (op.a.shape, op.b.shape) == ((3, 32), (3, 96))
    torch.testing.assert_close(op.a, torch.zeros_like(op.a), atol=1e-5, rtol=0)  # DEFT starts as the identity


def test_frod_over_inputs_that_nothing_reads(tmp_path: Path, llama: nn.Module) -> None:
    """The basis has no inverse then, and PEFT takes the pseudo-inverse."""
    base = copy.deepcopy(llama)
    for layer in base.model.layers:
        layer.self_attn.q_proj.weight[:, :3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            copy.deepcopy(base), peft.FrodConfig(progressbar=False, target_modules=["q_proj"])
        )
        module = adapted.get_submodule("base_model.model." + PATH)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1
        adapted.save_pretrained(tmp_path)
    (op,) = compiled(tmp_path, base).ops[PATH].extra
    assert isinstance(op, Dense)
    torch.testing.assert_close(op.weight, module.get_delta_weight("default").detach(), atol=1e-5, rtol=1e-5)
