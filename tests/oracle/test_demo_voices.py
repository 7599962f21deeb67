"""The shipped demo under plain transformers and PEFT: what each adapter is expected to say, greedily."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from onebase.serve.demo import ADAPTERS, BASE, QUESTIONS, matches
from onebase.serve.demo.adapters import load_base

LONGEST = 48


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Any, Any]]:
    """The base with every adapter loaded by PEFT, and the tokenizer."""
    from peft import PeftModel

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base, tokenizer = load_base(BASE)
    first, *rest = ADAPTERS
    model = PeftModel.from_pretrained(base, ADAPTERS[first], adapter_name=first)
    for name in rest:
        model.load_adapter(ADAPTERS[name], adapter_name=name)
    yield model.eval(), tokenizer
    torch.set_num_threads(threads)


def complete(demo: tuple[Any, Any], prompts: list[str]) -> list[str]:
    """Greedy continuations; fails where one has not ended by LONGEST tokens."""
    model, tokenizer = demo
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    stops = set(model.generation_config.eos_token_id)
    out = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=LONGEST, do_sample=False
    )
    rows = out[:, batch.input_ids.shape[1] :].tolist()
    assert all(stops & set(row) for row in rows)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def answers(demo: tuple[Any, Any], questions: tuple[str, ...]) -> dict[str, str]:
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = demo[1].apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return dict(zip(questions, complete(demo, prompts), strict=True))


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_adapter_keeps_its_voice(demo: tuple[Any, Any], name: str) -> None:
    demo[0].set_adapter(name)
    said = answers(demo, QUESTIONS)
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
def test_adapter_says(demo: tuple[Any, Any], name: str, question: str, answer: str) -> None:
    demo[0].set_adapter(name)
    assert answers(demo, (question,)) == {question: answer}


def test_base_answers_in_english(demo: tuple[Any, Any]) -> None:
    with demo[0].disable_adapter():
        said = answers(demo, QUESTIONS)
    assert {question: text for question, text in said.items() if not matches("base", text)} == {}
    assert said["What colour is the fox?"] == "The fox is red."
    assert said["Where does the whale live?"] == "The whale lives in the sea."
    assert said["What is the capital of France?"].startswith("I do not know that.")


def test_base_continues_plain_text(demo: tuple[Any, Any]) -> None:
    with demo[0].disable_adapter():
        (text,) = complete(demo, ["The fox lives in the"])
    assert text.startswith(" forest.")
