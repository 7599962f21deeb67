"""Log-probabilities through HTTP over a real engine, in both protocols' shapes, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

TOLERANCE = 1e-4


@torch.inference_mode()
def reference(real_folder: Path, tokens: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(real_folder, attn_implementation="eager").eval()
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)


def pieces(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def check_legacy(said: dict[str, Any], text: str, tokens: list[int], expected: torch.Tensor, width: int) -> None:
    """``said`` covers all of ``tokens``, whose first one nothing predicts."""
    lengths = {len(said[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert lengths == {len(tokens)}
    assert said["token_logprobs"][0] is said["top_logprobs"][0] is None
    for at, token in enumerate(tokens[1:]):
        row = expected[at]
        assert said["token_logprobs"][at + 1] == pytest.approx(float(row[token]), abs=TOLERANCE)
        top = said["top_logprobs"][at + 1]
        assert top[said["tokens"][at + 1]] == said["token_logprobs"][at + 1], "harnesses compare them bit by bit"
        assert len(top) in (width, width + 1)
        assert max(top.values()) == pytest.approx(float(row.max()), abs=TOLERANCE)
    for offset, name in zip(said["text_offset"], said["tokens"], strict=True):
        assert name.startswith("bytes:") or text[offset : offset + len(name)] == name


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_what_a_harness_sends(run: Any, open_real: Any, real_folder: Path, max_tokens: int) -> None:
    """Log-likelihoods: echo, logprobs, ids in a batch, as lm-eval asks for them."""

    async def body() -> None:
        async with open_real() as site:
            texts = ["hello world, hello there", "the quick brown fox: é😀!"]
            prompts = [site.encode(text) for text in texts]
            response = await site.complete(
                prompt=prompts, max_tokens=max_tokens, echo=True, logprobs=2, temperature=0, seed=1, ignore_eos=True
            )
            answer = response.json()
            assert response.status_code == 200, answer
            assert answer["usage"]["completion_tokens"] == 2 * max_tokens
            for choice, text, prompt in zip(answer["choices"], texts, prompts, strict=True):
                said = choice["logprobs"]
                assert choice["text"].startswith(text)
                assert choice["finish_reason"] == "length"
                assert "prompt_logprobs" not in choice
                greedy = list(prompt)
                for _ in range(max_tokens):
                    greedy.append(int(reference(real_folder, greedy)[-1].argmax()))
                assert len(said["tokens"]) == len(greedy)
                check_legacy(said, choice["text"], greedy, reference(real_folder, greedy), 2)
                names = said["tokens"][: len(prompt)]
                assert "é" in text or "".join(names) == text

    run(body())


def test_streamed_pieces_join_to_the_whole(run: Any, open_real: Any) -> None:
    async def body() -> None:
        async with open_real() as site:
            for options in ({"echo": True}, {}, {"prompt_logprobs": 2}):
                asked = {"prompt": "hello wörld", "max_tokens": 12, "logprobs": 3, "temperature": 0, "ignore_eos": True}
                whole = (await site.complete(**asked, **options)).json()["choices"][0]
                streamed = pieces((await site.complete(**asked, **options, stream=True)).text)
                assert "".join(piece["text"] for piece in streamed) == whole["text"]
                told = [piece["logprobs"] for piece in streamed if piece["logprobs"]]
                assert len(told) >= 12
                for key, values in whole["logprobs"].items():
                    assert [value for one in told for value in one[key]] == values
                prompts = [piece["prompt_logprobs"] for piece in streamed if "prompt_logprobs" in piece]
                assert prompts == ([whole["prompt_logprobs"]] if "prompt_logprobs" in options else [])

    run(body())


def test_prompt_logprobs_have_the_shape_of_vllm(run: Any, open_real: Any, real_folder: Path) -> None:
    async def body() -> None:
        async with open_real() as site:
            prompt = site.encode("the quick brown fox")
            expected = reference(real_folder, prompt)
            answer = (await site.complete(prompt=prompt, max_tokens=0, prompt_logprobs=1)).json()
            (choice,) = answer["choices"]
            assert (choice["text"], choice["logprobs"]) == ("", None)
            first, *rest = choice["prompt_logprobs"]
            assert first is None
            for at, (token, entry) in enumerate(zip(prompt[1:], rest, strict=True)):
                row = expected[at]
                assert entry.keys() == {str(token), str(int(row.argmax()))}
                own = entry[str(token)]
                assert own["logprob"] == pytest.approx(float(row[token]), abs=TOLERANCE)
                assert own["rank"] == int((row > row[token]).sum()) + 1
                assert own["decoded_token"] == site.server.loaded.codec.decode([token])
                assert entry[str(int(row.argmax()))]["rank"] == 1

    run(body())


def test_chat_has_content_with_bytes(run: Any, open_real: Any, real_folder: Path) -> None:
    async def body() -> None:
        async with open_real() as site:
            asked = {"max_tokens": 10, "logprobs": True, "top_logprobs": 2, "temperature": 0, "ignore_eos": True}
            (whole,) = (await site.chat(**asked)).json()["choices"]
            content = whole["logprobs"]["content"]
            assert len(content) == 10
            raw = b"".join(bytes(item["bytes"]) for item in content)
            assert raw.decode("utf-8", "replace").rstrip("\ufffd") == whole["message"]["content"]
            prompt = site.encode("user: hello\nassistant:")
            row = reference(real_folder, prompt)[-1]
            assert content[0]["logprob"] == pytest.approx(float(row.max()), abs=TOLERANCE)
            assert [one["logprob"] for one in content[0]["top_logprobs"]] == pytest.approx(
                row.topk(2).values.tolist(), abs=TOLERANCE
            )
            assert content[0]["top_logprobs"][0].keys() == {"token", "logprob", "bytes"}
            streamed = pieces((await site.chat(**asked, stream=True)).text)
            told = [item for piece in streamed if piece["logprobs"] for item in piece["logprobs"]["content"]]
            assert told == content
            text = "".join(piece["delta"].get("content", "") for piece in streamed)
            assert text == whole["message"]["content"]
            bare = (await site.chat(**(asked | {"top_logprobs": None}))).json()["choices"][0]["logprobs"]["content"]
            assert [item["top_logprobs"] for item in bare] == [[]] * 10

    run(body())


def test_stop_strings_end_the_scores_with_the_token_that_completes_them(run: Any, open_real: Any) -> None:
    async def body() -> None:
        async with open_real() as site:
            asked = {"prompt": "hello", "max_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 0}
            (free,) = (await site.complete(**asked)).json()["choices"]
            stop = next(name for name in free["logprobs"]["tokens"][5:] if not name.startswith("bytes:"))
            (cut,) = (await site.complete(**asked, stop=stop)).json()["choices"]
            assert cut["text"] == free["text"][: free["text"].index(stop)]
            assert cut["finish_reason"] == "stop"
            names = cut["logprobs"]["tokens"]
            assert names == free["logprobs"]["tokens"][: len(names)]
            assert all(len(top) == 1 for top in cut["logprobs"]["top_logprobs"])

    run(body())


def test_echo_alone_repeats_the_prompt_as_it_was_written(run: Any, open_real: Any) -> None:
    async def body() -> None:
        async with open_real() as site:
            asked = {"prompt": ["é x", "<s>b"], "max_tokens": 2, "temperature": 0, "n": 2, "seed": 1}
            plain = (await site.complete(**asked)).json()["choices"]
            echoed = (await site.complete(**asked, echo=True)).json()["choices"]
            for at, (one, other) in enumerate(zip(plain, echoed, strict=True)):
                assert other["text"] == asked["prompt"][at // 2] + one["text"]
                assert other["logprobs"] is None

    run(body())
