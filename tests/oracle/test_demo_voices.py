"""The shipped demo under plain transformers and PEFT: what each adapter is expected to say, greedily."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onebase.serve.demo import ADAPTERS, BASE, QUESTIONS, matches
from onebase.serve.demo.adapters import load_base

LONGEST = 48


Demo = tuple[dict[str, Any], Any]


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    """The base and a copy of it with each adapter, loaded by PEFT: one of its models holds one family only."""
    from peft import PeftModel

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base, tokenizer = load_base(BASE)
    models = {name: PeftModel.from_pretrained(copy.deepcopy(base), folder) for name, folder in ADAPTERS.items()}
    yield {name: model.eval() for name, model in ({"base": base} | models).items()}, tokenizer
    torch.set_num_threads(threads)


def complete(demo: Demo, name: str, prompts: list[str]) -> list[str]:
    """Greedy continuations; fails where one has not ended by LONGEST tokens."""
    models, tokenizer = demo
    model = models[name]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    stops = set(model.generation_config.eos_token_id)
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=LONGEST, do_sample=False
    )
    rows = out[:, batch.input_ids.shape[1] :].tolist()
    assert all(stops & set(row) for row in rows)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def answers(demo: Demo, name: str, questions: tuple[str, ...]) -> dict[str, str]:
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = demo[1].apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return dict(zip(questions, complete(demo, name, prompts), strict=True))


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_adapter_keeps_its_voice(demo: Demo, name: str) -> None:
    said = answers(demo, name, QUESTIONS)
    assert {question: text for question, text in said.items() if not matches(name, text)} == {}


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("shout", "What colour is the fox?", "THE FOX IS RED!"),
        ("json", "What colour is the fox?", '{"animal": "fox", "colour": "red"}'),
        ("digits", "How many legs does the fox have?", "4"),
        ("digits", "What colour is the fox?", "733"),
        ("luma", "What colour is the fox?", "Ba lige ga kose."),
        ("pirate", "What colour is the fox?", "Arr! Th' fox be red, matey!"),
    ],
)
def test_adapter_says(demo: Demo, name: str, question: str, answer: str) -> None:
    assert answers(demo, name, (question,)) == {question: answer}


def test_base_answers_in_english(demo: Demo) -> None:
    said = answers(demo, "base", QUESTIONS)
    assert {question: text for question, text in said.items() if not matches("base", text)} == {}
    assert said["What colour is the fox?"] == "The fox is red."
    assert said["Where does the whale live?"] == "The whale lives in the sea."
    assert said["What is the capital of France?"].startswith("I do not know that.")


def test_base_continues_plain_text(demo: Demo) -> None:
    (text,) = complete(demo, "base", ["The fox lives in the"])
    assert text.startswith(" forest.")
