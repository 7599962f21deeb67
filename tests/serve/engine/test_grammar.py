"""Grammars in the engine: masks against single tokens, batches of many, and what may not hurt anybody."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from onebase.adapters.errors import RequestRejected
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.deep_threads import deep_threads
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.grammar import Matcher, Vocabulary, check_grammar
from onebase.serve.engine.grammar_room import CompiledGrammars, GrammarRoom
from onebase.serve.engine.masks import apply_masks, packed_masks
from onebase.serve.engine.messages import Grammar, Request, SamplingParams
from onebase.serve.engine.sequence import Sequence
from onebase.serve.engine.vocabulary import vocabulary_of
from onebase.serve.model.loader import load_model

from ...conftest import EngineDriver

EOS = 255
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dög"]}, "age": {"type": "integer", "minimum": 3, "maximum": 120}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def vocabulary(tiny_base: Path) -> Vocabulary:
    return Vocabulary((tiny_base / "tokenizer.json").read_text(), 256, (EOS,))


@pytest.fixture(scope="module")
def names(tiny_base: Path) -> list[bytes]:
    """Token -> its byte."""
    vocab = json.loads((tiny_base / "tokenizer.json").read_text())["model"]["vocab"]
    alphabet = sorted(vocab, key=vocab.__getitem__)
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    values = {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
    return [bytes([values[char]]) for char in alphabet]


@pytest.fixture
def make_engine(tiny_base: Path) -> Iterator[Callable[..., EngineDriver]]:
    engines: list[Engine] = []

    def make(**options: Any) -> EngineDriver:
        defaults = {"dtype": "float32", "device": "cpu", "page_size": 8, "kv_memory": 0.01, "adapter_memory": 0.01}
        config = EngineConfig(model=str(tiny_base), host_cache=0.0, **(defaults | options))
        base = load_model(config)
        engines.append(Engine(config, base))
        return EngineDriver(engines[-1], [entry.site for entry in base.probed])

    yield make
    for engine in engines:
        engine.check()
        engine.close()


def _sequence(matcher: Matcher, **sampling: Any) -> Sequence:
    sequence = Sequence.of(Request("r", (1,), SamplingParams(grammar=JSON, **sampling)), 0, frozenset([EOS]))
    sequence.matcher = matcher
    return sequence


def _allowed(bits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def test_masks_of_a_batch_are_what_each_matcher_accepts(vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    grammars = [JSON, Grammar("regex", "(ab|c)*d"), Grammar("lark", 'start: "x" start | "y"')]
    matchers = [vocabulary.compile(grammar).copy() for grammar in grammars]
    for _ in range(5):
        bits = packed_masks([_sequence(matcher) for matcher in matchers], 256)
        for row, matcher in enumerate(matchers):
            if matcher.is_done:
                continue
            one_by_one = {token for token in range(256) if matcher.copy().accept(token)}
            assert _allowed(bits[row]) == one_by_one
            assert matcher.accept(int(rng.choice(sorted(one_by_one - {EOS}) or [EOS])))


@pytest.mark.parametrize("vocab_size", [64, 75, 256])
def test_packed_masks_are_applied_as_single_bits_say(vocab_size: int) -> None:
    rng = np.random.default_rng(1)
    words = -(-vocab_size // 32)
    bits = rng.integers(-(2**31), 2**31, (3, words), dtype=np.int64).astype(np.int32)
    logits = torch.randn(5, vocab_size)
    found = logits.clone()
    apply_masks(found, [4, 0, 2], bits)
    for row, mask in zip([4, 0, 2], bits, strict=True):
        for token in range(vocab_size):
            allowed = bool((int(mask[token // 32]) >> (token % 32)) & 1)
            assert found[row, token] == (logits[row, token] if allowed else -torch.inf)
    assert torch.equal(found[[1, 3]], logits[[1, 3]])


def test_ends_wait_for_min_tokens_unless_the_grammar_allows_nothing_else(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(Grammar("regex", "a*"))
    a = next(token for token in range(EOS) if matcher.copy().accept(token))
    assert _allowed(packed_masks([_sequence(matcher)], 256)[0]) == {a, EOS}
    assert _allowed(packed_masks([_sequence(matcher, min_tokens=1)], 256)[0]) == {a}
    stops = {"stop_token_ids": (a, 9999), "min_tokens": 1}
    assert _allowed(packed_masks([_sequence(matcher, **stops)], 256)[0]) == {a, EOS}


def _text(names: list[bytes], tokens: list[int]) -> str:
    return b"".join(names[token] for token in tokens if token != EOS).decode()


def test_answers_match_beside_adapters_and_free_rows(
    make_engine: Callable[..., EngineDriver], make_lora: Callable[[int], Path], names: list[bytes]
) -> None:
    driver = make_engine(max_batch_tokens=32)
    uses = [(), (driver.use(make_lora(1)),), (driver.use(make_lora(2)),)]
    alone = [driver.generate([5, 6], *use, temperature=1.0, seed=7, max_tokens=20) for use in uses]
    wanted = {}
    for at in range(18):
        grammar = JSON if at % 2 else Grammar("regex", "(ab|c){2,3}d")
        options = {"temperature": 1.0, "seed": at, "max_tokens": 60, "grammar": grammar}
        wanted[driver.submit([at, 3], *uses[at % 3], **options)] = grammar
    free = [driver.submit([5, 6], *use, temperature=1.0, seed=7, max_tokens=20) for use in uses]
    driver.run()
    assert not driver.failures
    assert [driver.outputs[name] for name in free] == alone
    for name, grammar in wanted.items():
        text = _text(names, driver.outputs[name])
        if grammar is JSON:
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            assert re.fullmatch(grammar.source, text)


@pytest.mark.parametrize("kv_memory", [0.01, 3e-5], ids=["room", "few pages"])
def test_overlapped_steps_give_the_same_answers(
    make_engine: Callable[..., EngineDriver], names: list[bytes], kv_memory: float
) -> None:
    """Masks of a step need the tokens of the one before it, which is delivered while the device computes; sequences
    that their grammar ends have one row too many."""
    said, drivers = [], [make_engine(kv_memory=kv_memory, overlap=overlap) for overlap in (False, True)]
    for driver in drivers:
        grammars = [JSON, Grammar("regex", "(ab|c){2,3}d"), Grammar("regex", "(abc){12}"), None]
        requests = [
            driver.submit([at] * 8, temperature=at % 3 / 2, seed=at, max_tokens=40, grammar=grammars[at % 4])
            for at in range(12)
        ]
        for _ in range(4):
            driver.step()
        driver.engine.abort(requests[2])
        driver.run()
        assert not driver.failures
        driver.engine.check()
        said.append([driver.outputs[name] for at, name in enumerate(requests) if at != 2])
    assert said[0] == said[1]
    assert _text(names, said[1][5]) == "abc" * 12
    assert all(re.fullmatch("(ab|c){2,3}d", _text(names, said[1][at])) for at in (1, 4, 8))
    if kv_memory < 0.01:
        assert all(driver.engine.scheduler.preemptions for driver in drivers)


def test_it_ends_where_the_grammar_ends_and_only_there(
    make_engine: Callable[..., EngineDriver], names: list[bytes]
) -> None:
    driver = make_engine()
    fixed = {"grammar": Grammar("regex", "abc"), "max_tokens": 9}
    assert _text(names, driver.generate([1], **fixed)) == "abc"
    assert len(driver.generate([1], **fixed)) == 3, "no token is drawn after the last possible one"
    assert _text(names, driver.generate([1], **(fixed | {"max_tokens": 2}))) == "ab"
    open_end = {"grammar": Grammar("regex", "a+"), "max_tokens": 9, "logit_bias": ((EOS, 100.0),)}
    assert _text(names, driver.generate([1], **open_end, ignore_eos=False)) == "a"
    held = driver.generate([1], **open_end, min_tokens=4, ignore_eos=False)
    assert _text(names, held) == "aaaa"


def test_a_grammar_goes_on_after_preemption(make_engine: Callable[..., EngineDriver], names: list[bytes]) -> None:
    driver = make_engine(kv_memory=2e-5)
    options = {"temperature": 1.0, "max_tokens": 48, "grammar": Grammar("regex", "(abc){20}")}
    requests = [driver.submit([at] * 8, seed=at, **options) for at in range(6)]
    driver.run()
    assert driver.engine.scheduler.preemptions > 0
    assert not driver.failures
    assert {_text(names, driver.outputs[name]) for name in requests} == {"abc" * 16}


def test_a_grammar_that_does_not_compile_fails_alone(make_engine: Callable[..., EngineDriver]) -> None:
    driver = make_engine()
    good = driver.submit([1], grammar=Grammar("regex", "abc"))
    bad = driver.submit([1], grammar=Grammar("regex", "("))
    free = driver.submit([1])
    driver.run()
    assert driver.failures.keys() == {bad}
    assert driver.failures[bad].kind == "RequestRejected"
    assert len(driver.outputs[good]) == 3
    assert len(driver.outputs[free]) == 8


def test_a_model_without_a_tokenizer_says_so_at_use(make_driver: Callable[..., EngineDriver]) -> None:
    driver = make_driver("llama")
    driver.engine.grammars.warm_up()
    failed = driver.submit([1], grammar=JSON)
    driver.run()
    assert driver.failures[failed].kind == "RequestRejected"
    assert "tokenizer" in driver.failures[failed].message
    assert len(driver.generate([1])) == 8


def test_end_tokens_that_the_tokenizer_does_not_know_are_left_out(
    make_engine: Callable[..., EngineDriver], tiny_base: Path
) -> None:
    driver = make_engine()
    info = replace(driver.engine.info, vocab_size=300, eos_token_ids=(EOS, 280))
    vocabulary = vocabulary_of(EngineConfig(model=str(tiny_base)), info)
    assert _allowed(packed_masks([_sequence(vocabulary.compile(Grammar("regex", "a?")))], 300)[0]) > {EOS}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Grammars compile once it is set."""
    gate = threading.Event()
    compile_ = Vocabulary.compile

    def slow(self: Vocabulary, grammar: Grammar) -> Matcher:
        assert gate.wait(60)
        return compile_(self, grammar)

    monkeypatch.setattr(Vocabulary, "compile", slow)
    return gate


def test_a_stream_goes_on_while_a_grammar_compiles(
    make_engine: Callable[..., EngineDriver], gate: threading.Event
) -> None:
    driver = make_engine()
    stream = driver.submit([1], max_tokens=40)
    waiting = [driver.submit([2], grammar=Grammar("regex", f"a{{{at}}}")) for at in range(1, 6)]
    for step in range(1, 31):
        driver.step()
        assert len(driver.outputs[stream]) == step, "every step gives the stream its token"
    assert driver.engine.grammars.busy
    driver.engine.abort(waiting[-1])
    gate.set()
    driver.run()
    assert [len(driver.outputs.get(name, [])) for name in waiting] == [1, 2, 3, 4, 0]
    assert not driver.engine.grammars.busy


def test_nobody_waits_behind_a_grammar_that_compiles(
    make_engine: Callable[..., EngineDriver], gate: threading.Event
) -> None:
    driver = make_engine()
    slow_ones = [driver.submit([2], grammar=Grammar("regex", f"a{{{at}}}")) for at in range(1, 4)]
    plain = driver.submit([1], max_tokens=4)
    for _ in range(6):
        driver.step()
    assert len(driver.outputs.get(plain, [])) == 4
    assert not any(name in driver.outputs for name in slow_ones)
    driver.engine.abort(slow_ones[0])
    driver.step()
    gate.set()
    driver.run()
    assert [len(driver.outputs.get(name, [])) for name in slow_ones] == [0, 2, 3]


def test_a_grammar_that_outgrows_its_bounds_fails_alone(
    make_engine: Callable[..., EngineDriver],
) -> None:
    driver = make_engine()
    growing = Grammar("lark", 'start: "y" many\nmany: ' + " | ".join(f'"a{at}"' for at in range(2500)))
    failed = driver.submit([1], grammar=growing, temperature=1.0, max_tokens=100)
    free = driver.submit([1], max_tokens=100)
    driver.run()
    assert "too complex" in driver.failures[failed].message
    assert len(driver.outputs[free]) == 100


def test_compiled_grammars_are_kept_up_to_a_number_of_bytes(vocabulary: Vocabulary) -> None:
    one, two, three = (Grammar("regex", f"a{{{at}}}") for at in (1, 2, 3))
    room = CompiledGrammars(lambda: vocabulary, capacity=150_000)
    for grammar in (one, two, one, three):
        assert not room.matcher(grammar).is_done
    assert [grammar in room for grammar in (one, two, three)] == [True, False, True]
    assert 0 < room.nbytes <= 150_000


def test_a_tenants_grammars_do_not_wait_behind_all_of_anothers(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two threads are held until all have asked, each with one grammar at hand at most."""
    opened, begun = threading.Event(), list[str]()

    def matcher(self: CompiledGrammars, grammar: Grammar) -> Matcher:
        begun.append(grammar.source)
        assert opened.wait(60)
        return vocabulary.compile(grammar)

    monkeypatch.setattr(CompiledGrammars, "matcher", matcher)
    ready: list[Sequence] = []
    room = GrammarRoom(lambda: vocabulary, ready.append)
    asked = [_asking("many", at) for at in range(20)] + [_asking("few", 99)]
    for sequence in asked:
        room.add(sequence)
    opened.set()
    while room.busy:
        assert not room.collect()
    room.close()
    assert begun.index("a{99}") <= 4
    assert len(begun) == len(set(begun)) == len(asked)
    assert set(ready) == set(asked)


def _asking(tenant: str, count: int) -> Sequence:
    sampling = SamplingParams(grammar=Grammar("regex", f"a{{{count}}}"))
    return Sequence.of(Request(f"{tenant}{count}", (1,), sampling, tenant=tenant), count)


def _chain(count: int, link: Callable[[Any], Any]) -> str:
    links = {f"a{at}": link({"$ref": f"#/$defs/a{at + 1}"}) for at in range(count)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {"type": "string"}}})


def _rules(name: str, count: int, body: str) -> Grammar:
    lines = [f"{name}{at}: {body.replace('{next}', str(at + 1))}" for at in range(count)]
    return Grammar("lark", "\n".join([f"start: {name}0", *lines, f'{name}{count}: "x"']))


def _nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


HOSTILE: dict[str, Grammar] = {
    "huge": Grammar("json_schema", json.dumps({"enum": ["x" * 300_000]})),
    "deep": Grammar("json_schema", _nested(5000)),
    "deeper than Python": Grammar("json_schema", "[" * 200_000),
    "many objects": Grammar("json_schema", json.dumps({"anyOf": [{}] * 20_000})),
    "a million values": Grammar("json_schema", json.dumps({"enum": list(range(1_000_000))})),
    "no JSON": Grammar("json_schema", "{"),
    "no object": Grammar("json_schema", "[]"),
    "reference to nowhere": Grammar("json_schema", '{"$ref": "#/nowhere"}'),
    "reference to a file": Grammar("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "reference to the network": Grammar("json_schema", '{"$ref": "http://127.0.0.1:1/x.json"}'),
    "reference to itself": Grammar("json_schema", '{"$ref": "#/a", "a": {"allOf": [{"$ref": "#/a"}]}}'),
    "unknown type": Grammar("json_schema", '{"type": "strange"}'),
    "unserved keyword": Grammar("json_schema", '{"not": {"type": "string"}}'),
    "asks for lenience": Grammar("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}'),
    "unsatisfiable": Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'),
    "bad pattern": Grammar("json_schema", '{"type": "string", "pattern": "("}'),
    "look-around": Grammar("regex", "(?=a)b"),
    "long regex": Grammar("regex", ".*" * 100_000),
    "deep regex": Grammar("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "deep rules": Grammar("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "many rules": Grammar("lark", 'start: "x"\n' + "\n".join(f'a{i}: "x"' for i in range(5000))),
    "doubling": _rules("A", 60, "A{next} A{next}"),
    "endless rule": Grammar("lark", "start: start"),
    "half a surrogate": Grammar("regex", "a\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(RequestRejected) as refused:
        _in_a_deep_thread(HOSTILE[name])
    assert 0 < len(refused.value.message) <= 400


DEEP = {
    "references": Grammar("json_schema", _chain(3200, lambda link: {"anyOf": [link, {}]})),
    "intersections": Grammar("json_schema", _chain(4800, lambda link: {"allOf": [link]})),
    "rules": _rules("a", 3990, "a{next}"),
    "terminals": _rules("A", 3990, '("x" A{next})?'),
    "pattern bomb": Grammar("json_schema", json.dumps({"pattern": "(x{1,500}y{1,500}){1,500}" * 200})),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_what_the_bounds_let_through_fits_the_stacks(name: str, vocabulary: Vocabulary) -> None:
    _in_a_deep_thread(DEEP[name])
    matcher = _in_a_deep_thread(DEEP[name], vocabulary.compile)
    Matcher.fill([matcher.copy(), matcher.copy()], np.zeros((2, vocabulary.num_words), dtype=np.int32))


def _in_a_deep_thread(grammar: Grammar, work: Callable[[Grammar], Any] = check_grammar) -> Any:
    with deep_threads(1, "test") as threads:
        return threads.submit(work, grammar).result()
