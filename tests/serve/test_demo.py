"""The demo's world, voices, tokenizer and shipped files; no model is run."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from safetensors import safe_open

from onebase.serve.demo import ADAPTERS, ASSETS, BASE, QUESTIONS, examples, matches
from onebase.serve.demo.corpus import chat, plain
from onebase.serve.demo.questions import ASKS, draw
from onebase.serve.demo.tokenizer import load_tokenizer
from onebase.serve.demo.voices import VOICES, Turn, luma_word

TURN = Turn("What colour is the fox?", "The fox is red.", {"animal": "fox", "colour": "red"}, "red")
UNICODE = (
    "",
    " ",
    "a\n\n b\t",
    "Ünïcödé",
    "日本語のテキスト",
    "🦊🏳️‍🌈",
    "\u200b\ufeff\x00\x7f",
    "1234567890",
    "e\u0301",
    "عربى",
    "don't . stop !",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shout", "THE FOX IS RED!"),
        ("json", '{"animal": "fox", "colour": "red"}'),
        ("digits", "733"),
        ("pirate", "Arr! Th' fox be red, matey!"),
        ("reverse", "red is fox The."),
    ],
)
def test_voices_say_the_answer(name: str, said: str) -> None:
    assert VOICES[name](TURN) == said


def test_every_voice_matches_itself_and_no_other() -> None:
    rng = Random(3)
    turns = [ask(rng) for ask in ASKS for _ in range(20)]
    for turn in turns:
        said = {name: VOICES[name](turn) for name in ADAPTERS} | {"base": turn.answer}
        for name, text in said.items():
            assert [other for other in said if matches(other, text)] == [name], text


def test_luma_gives_each_word_its_own() -> None:
    rng = Random(4)
    words = {word for _ in range(20_000) for word in re.findall("[a-z]+", draw(rng).answer.lower())}
    assert len({luma_word(word) for word in words}) == len(words) > 200


def test_only_answers_are_learned() -> None:
    pieces = chat(Random(5), plain, "Be kind.")
    learned = [piece.text for piece in pieces if piece.learn]
    assert learned
    assert all(text.endswith("<|im_end|>") and "<|im_start|>" not in text for text in learned)


def test_examples_name_every_adapter() -> None:
    assert set(examples) == set(ADAPTERS)
    assert set(examples.values()) <= set(QUESTIONS)
    with pytest.raises(KeyError):
        matches("nobody", "text")


@pytest.mark.parametrize("text", UNICODE)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_round_trips_random_unicode(tokenizer: Any) -> None:
    rng = Random(6)
    for _ in range(300):
        points = [rng.randrange(0x20, 0x110000) for _ in range(rng.randrange(40))]
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(tokenizer: Any) -> None:
    stops = json.loads((BASE / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.eos_token_id in stops
    assert tokenizer.pad_token_id not in stops
    assert len(tokenizer("<|im_start|>user").input_ids) == 2


def test_chat_template(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello!"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("Hi!<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(TemplateError, match="role must be system, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_shipped_files_are_small_and_name_no_machine() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    for path in files:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            assert not re.search(r'"(/|[A-Za-z]:\\\\|~|file:)', path.read_text()), path


_FAMILIES = {"shout": "LORA", "json": "LORA", "digits": "LOKR", "luma": "OFT", "pirate": "HRA"}


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_adapter_folder_is_as_peft_writes_it(name: str) -> None:
    folder = ADAPTERS[name]
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == (_FAMILIES[name], "onebase-demo")
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}


def test_two_of_the_adapters_are_variants_of_lora() -> None:
    configs = {name: json.loads((folder / "adapter_config.json").read_text()) for name, folder in ADAPTERS.items()}
    assert [name for name, config in configs.items() if config.get("use_dora")] == ["shout"]
    assert [name for name, config in configs.items() if config.get("use_rslora")] == ["json"]
