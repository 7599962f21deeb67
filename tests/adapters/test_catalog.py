"""docs/adapters.md is what the generator writes, names every PEFT type, and its refusals are those of the compilers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from torch import nn

from onebase.adapters.catalog import instructions, page
from onebase.adapters.costs import COSTS
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats import compile_folder, families, register
from onebase.adapters.formats.refusals import REFUSED_FAMILIES, REFUSED_OPTIONS, OptionRefusal
from onebase.adapters.survey import Fate, methods

from .conftest import TinyBase, edit_config

DOCUMENT = Path(__file__).parents[2] / "docs/adapters.md"
REGISTERED = {family.peft_type for family in families()}


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == page(), "run: python -m onebase.adapters.catalog docs/adapters.md"


@pytest.mark.parametrize("name", [str(kind.value) for kind in peft.PeftType])
def test_every_peft_type_is_served_or_refused_by_name(name: str) -> None:
    refusal = REFUSED_FAMILIES.get(name)
    assert (name in REGISTERED) is (refusal is None)
    assert refusal is None or (refusal.reason.endswith(".") and refusal.way_out.endswith("."))


def test_every_method_of_the_surveys_goes_somewhere() -> None:
    names = [method.name for method in methods()]
    assert len(set(names)) == len(names)
    for method in methods():
        assert set(method.through) <= REGISTERED, method.name
        assert bool(method.through) is (method.fate is not Fate.REFUSED), method.name
        assert method.how, method.name


def test_every_instruction_has_its_cost() -> None:
    assert set(instructions()) | {"AddOut"} == set(COSTS)
    for family in families():
        assert set(family.instructions) <= set(COSTS), family.peft_type
        assert family.title, family.peft_type
        assert family.cost, family.peft_type


@pytest.mark.parametrize("name", REFUSED_FAMILIES)
def test_a_refused_family_answers_with_its_own_reason(name: str, adapter: Path, llama: nn.Module) -> None:
    edit_config(adapter, peft_type=name)
    with pytest.raises(AdapterRejected) as refusal:
        compile_folder(adapter, TinyBase(llama), "d")
    for said in (name, REFUSED_FAMILIES[name].reason, REFUSED_FAMILIES[name].way_out):
        assert said in refusal.value.message
    assert refusal.value.param == "peft_type"
    with pytest.raises(ValueError, match="refused by name"):
        register(name, title="", paper="", instructions=(), cost="")


OF_PEFT = [option for option in REFUSED_OPTIONS if not option.family.startswith("AH_")]  # PEFT makes no others


@pytest.mark.parametrize("option", OF_PEFT, ids=lambda option: option.title)
def test_a_refused_option_is_refused(
    option: OptionRefusal, llama: nn.Module, adapter_of: Callable[[str], Path]
) -> None:
    folder = adapter_of(option.family)
    compile_folder(folder, TinyBase(llama), "d")
    edit_config(folder, **option.fields)
    with pytest.raises(AdapterRejected) as refusal:
        compile_folder(folder, TinyBase(llama), "d")
    assert next(iter(option.fields)) in str(refusal.value.param)


@pytest.fixture
def adapter_of(llama: nn.Module, tmp_path: Path) -> Callable[[str], Path]:
    """A plain adapter of a family, made by PEFT."""

    def make(family: str) -> Path:
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(family)](target_modules=["q_proj"], r=4)
        folder = tmp_path / family
        peft.get_peft_model(copy.deepcopy(llama), config).save_pretrained(folder)
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == family
        return folder

    return make
