"""Pattern tables pick what PEFT picks, and no pattern costs much."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from onebase.adapters.errors import AdapterRejected, AdapterTooLarge
from onebase.adapters.formats.automaton import PatternError, parse_pattern
from onebase.adapters.formats.patterns import MAX_KEYS, PatternTable

PATHS = [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1, 10, 11) for m in "qkvo"]
PATHS += ["lm_head", "model.embed_tokens", "q_proj", "a", "ab.a", "model.layers.1.mlp.q_proj"]

KEYS = ["q_proj", "lm_head", "layers.1.self_attn.q_proj", "^model.layers.1.self_attn.v_proj", "^q_proj", "^q_proj$"]
KEYS += ["self_attn.q.proj", "layers.1", ".q_proj", "1.self_attn.q_proj", "_proj", "q|v_proj", "(q|k)_proj", "proj$"]
KEYS += [r"model\.layers\.\d+\.self_attn\.q_proj", r"layers\.1[01]?\..*_proj", r".*\.q_proj", ".*", "", "a?b?.?a"]
KEYS += ["layers.[^1]*.(?:self_attn|mlp).q_proj", r"\w+_proj", "(.*q_proj|lm_head)", "x{0}a", "(ab)?.a", "1{2}.+q_proj"]
KEYS += ["(^model|a).*", "o_proj|^lm_head$|a$", "[a-c]+", "(a*)*", "(a|ab)(.a)?", "a{1,3}?"]


@settings(max_examples=400, deadline=None)
@given(keys=st.lists(st.sampled_from(KEYS), max_size=5, unique=True))
@example(keys=KEYS)
def test_tables_agree_with_peft(keys: list[str]) -> None:
    table = PatternTable("rank_pattern", {key: float(index) for index, key in enumerate(keys)})
    for path in PATHS:
        chosen = get_pattern_key(keys, path)
        assert table.find(path) == (float(keys.index(chosen)) if chosen in keys else None), path


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\W", "^", "$"])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "{0}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=1500, deadline=None)
@given(pattern=REGEXES, path=st.text("ab.", max_size=8))
def test_automata_agree_with_re(pattern: str, path: str) -> None:
    expected = re.match(rf"(.*\.)?({pattern})$", path) is not None
    assert parse_pattern(pattern).matches(path) == expected


@settings(max_examples=1000, deadline=None)
@given(
    pattern=st.text("ab.()[]{}|*+?^$\\d1,-:=!<P&", max_size=12) | st.text(max_size=6), path=st.text("ab.1", max_size=6)
)
def test_any_text_is_matched_as_re_does_or_refused(pattern: str, path: str) -> None:
    try:
        found = parse_pattern(pattern).matches(path)
    except PatternError:
        return
    assert found == (re.match(rf"(.*\.)?({pattern})$", path) is not None)


UNSERVED = [
    r"(a)\1",
    "(?=a)b",
    "(?<!a)b",
    "(?i)a",
    "a*+",
    "(?>a)",
    "(?P<x>a)",
    r"\bq",
    "a)|(b",
    "(a",
    "[z-a]",
    "a**",
    "*",
]


@pytest.mark.parametrize("pattern", UNSERVED)
def test_exotic_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(AdapterRejected, match="rank_pattern"):
        PatternTable("rank_pattern", {pattern: 4.0})


HOSTILE = ["(a+)+x", "(.*)*z", "(q|q)*p", ".*.*.*.*.*.*.*.*z", "((a*)*)*b", "(.{0,20}){0,20}z", "(.?){60}(_?){60}#"]
HOSTILE += ["((((a{64}){64}){64}){64}){64}", "(((((){64}){64}){64}){64}){64}", "(" * 250 + ")" * 250, "(a|b|.)*" * 60]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_cost_little(pattern: str) -> None:
    paths = [f"model.layers.{i}.self_attn.q_proj.{'a' * (i % 40)}" for i in range(1000)]
    started = time.process_time()
    try:
        table = PatternTable("alpha_pattern", {pattern: 1.0})
        assert [table.find(path) for path in paths]
    except AdapterRejected:
        pass
    assert time.process_time() - started < 2


def test_tables_are_bounded() -> None:
    for table in (
        {f"layer{i}": 1.0 for i in range(MAX_KEYS + 1)},
        {f"a{i}|b": 1.0 for i in range(33)},
        {"a" * i: 1.0 for i in range(1, 400)},
        {"a" * 513: 1.0},
    ):
        with pytest.raises(AdapterTooLarge, match="rank_pattern"):
            PatternTable("rank_pattern", table)
