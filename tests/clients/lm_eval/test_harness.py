"""lm-evaluation-harness: local-completions over the server equals its own hf backend with the adapter loaded by PEFT.

The tasks are made from local files: answers to choose from (loglikelihood), documents (loglikelihood_rolling), and
questions to answer (generate_until).
"""

from __future__ import annotations

import json
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TOLERANCE = 1e-3
CHOICES = [
    {"question": "What colour is the fox?", "choices": ["red", "blue", "The fox is red."], "gold": 0},
    {"question": "How many legs does the spider have?", "choices": ["eight", "8", "two legs"], "gold": 1},
    {"question": "Where does the whale live? Grüße, 世界 🦊", "choices": [" in the sea", " on a farm"], "gold": 0},
]
DOCUMENTS = [
    {"text": "The fox is red. The owl can fly, and the whale lives in the sea."},
    {"text": "It was a long day in the valley. " * 30},  # several windows
    {"text": "ÅÆ 🦉"},
]
QUESTIONS = [{"question": "What colour is the fox?"}, {"question": "Who is the baker?"}]
COMMON = {"dataset_path": "json", "test_split": "test"}
PROMPT = "<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n"
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choose": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "read": (
        DOCUMENTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "answer": (
        QUESTIONS,
        {
            "output_type": "generate_until",
            "doc_to_text": PROMPT,
            "doc_to_target": "red",
            "generation_kwargs": {"until": ["!", "\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, config) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **COMMON, "dataset_kwargs": source, **config}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def _evaluate(model: Any, tasks: TaskManager, **options: Any) -> Any:
    return lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=tasks, log_samples=True, bootstrap_iters=0, **options
    )


def _through_peft(served: Any, adapter: str, tasks: TaskManager) -> Any:
    with torch.inference_mode():
        model = HFLM(
            pretrained=str(served.base),
            peft=str(served.adapters[adapter]),
            dtype="float32",
            device="cpu",
            max_length=128,
        )
        return _evaluate(model, tasks)


def _through_server(served: Any, adapter: str, tasks: TaskManager, **options: Any) -> Any:
    arguments = {
        "model": adapter,
        "base_url": f"{served.v1}/completions",
        "max_length": 130,  # its windows are two shorter: it keeps one for the token generated, and one more
        "num_concurrent": 2,
        **options,
    }
    return _evaluate("local-completions", tasks, model_args=arguments)


def _responses(results: Any, task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda one: one["doc_id"])]


@pytest.mark.parametrize("adapter", ["shout", "pirate"])
def test_numbers_are_those_of_peft(served: Any, adapter: str, tasks: TaskManager, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", served.key)
    expected = _through_peft(served, adapter, tasks)
    found = _through_server(served, adapter, tasks, tokenizer=str(served.base), tokenizer_backend="huggingface")
    for ours, theirs in zip(_responses(found, "choose"), _responses(expected, "choose"), strict=True):
        for (logprob, greedy), (wanted, is_greedy) in zip(ours, theirs, strict=True):
            assert (float(logprob), greedy) == (pytest.approx(float(wanted), abs=TOLERANCE), is_greedy)
    for ours, theirs in zip(_responses(found, "read"), _responses(expected, "read"), strict=True):
        assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=TOLERANCE)
    assert _responses(found, "answer") == _responses(expected, "answer")
    for task in TASKS:
        numbers = {key: value for key, value in expected["results"][task].items() if isinstance(value, float)}
        assert numbers == {key: pytest.approx(found["results"][task][key], abs=TOLERANCE) for key in numbers}


def test_adapters_differ(served: Any, tasks: TaskManager, monkeypatch: Any) -> None:
    """Otherwise the numbers above would say nothing of adapters. The tokenizer is asked of the server here."""
    monkeypatch.setenv("OPENAI_API_KEY", served.key)
    options = {"tokenizer_backend": "remote", "auth_token": served.key}
    found = [_through_server(served, name, tasks, **options) for name in (served.model, *served.adapters)]
    local = _through_server(served, "shout", tasks, tokenizer=str(served.base), tokenizer_backend="huggingface")
    told = [json.dumps(_responses(one, "read")) for one in found]
    assert len(set(told)) == 3
    assert _responses(local, "read") == _responses(found[1], "read")
