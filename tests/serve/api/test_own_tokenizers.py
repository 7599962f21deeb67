"""Adapters with a chat template or a tokenizer of their own: served with them, checked as a stranger's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from onebase.adapters.check import TOKENIZER_FILES
from tests.serve.api.conftest import make_tokenizer

OWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def bring(adapter_folder: Callable[..., Path]) -> Callable[..., Path]:
    """bring(name, **files): an adapter with these files too; a dict is written as JSON, underscores become dots."""

    def make(name: str, seed: int = 0, **files: Any) -> Path:
        folder = adapter_folder(name, seed)
        for key, content in files.items():
            path = folder / ("chat_template.jinja" if key == "template" else f"{key}.json")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


def extended(*tokens: str, tokenizer: Tokenizer | None = None) -> str:
    made = tokenizer or make_tokenizer()
    made.add_tokens([AddedToken(token, special=True) for token in tokens])
    return str(made.to_str())


def prompt_of(site: Any) -> list[int]:
    return list(site.engine.requests[-1].prompt)


async def text_of(site: Any, tokens: list[int], model: str = "base") -> str:
    return str((await site.post("/detokenize", model=model, tokens=tokens)).json()["prompt"])


def test_an_adapter_is_served_with_its_own_template(run: Any, open_site: Any, bring: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            assert (await site.upload("own", bring("own", template=OWN))).status_code == 201
            assert (await site.upload("plain", bring("plain", seed=1))).status_code == 201
            for model, expected in (("own", "[user]hello</s>"), ("plain", "user: hello\nassistant:")):
                assert (await site.chat(model=model, max_tokens=1)).status_code == 200
                assert await text_of(site, prompt_of(site)) == expected
                told = await site.post("/tokenize", model=model, messages=[{"role": "user", "content": "hello"}])
                assert await text_of(site, told.json()["tokens"]) == expected
            assert (await site.chat(adapters=[{"name": "plain"}, {"name": "own"}], max_tokens=1)).status_code == 200
            assert await text_of(site, prompt_of(site)) == "[user]hello</s>", (
                "of those named, the first that brings one"
            )

    run(body())


def test_a_new_version_has_its_own_template_at_once(run: Any, open_site: Any, bring: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            for name, template in (("a", OWN), ("b", OWN.replace("[", "<"))):
                assert (await site.upload("own", bring(name, template=template))).status_code == 201
                await site.chat(model="own", max_tokens=1)
                assert (await text_of(site, prompt_of(site))).startswith("<" if name == "b" else "[")
            await site.chat(model="own@1", max_tokens=1)
            assert (await text_of(site, prompt_of(site))).startswith("[")

    run(body())


def test_templates_within_the_config_and_special_tokens(run: Any, open_site: Any, bring: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            config = {"chat_template": OWN, "eos_token": {"content": "<s>"}, "auto_map": {"x": "y.py"}}
            assert (await site.upload("own", bring("own", tokenizer_config=config))).status_code == 201
            await site.chat(model="own", max_tokens=3)
            request = site.engine.requests[-1]
            assert await text_of(site, list(request.prompt)) == "[user]hello<s>"
            assert request.sampling.stop_token_ids == (0,), "its own end token ends its answers"
            await site.chat(model="own", max_tokens=3, ignore_eos=True)
            assert site.engine.requests[-1].sampling.stop_token_ids == ()
            named = [{"name": "default", "template": OWN}, {"name": "tool_use", "template": "{{ tools | length }}"}]
            files = {"tokenizer_config": {"chat_template": named}, "special_tokens_map": {"eos_token": None}}
            assert (await site.upload("many", bring("many", **files))).status_code == 201
            await site.chat(model="many", max_tokens=1)
            assert await text_of(site, prompt_of(site)) == "[user]hello"
            tool = {"type": "function", "function": {"name": "f"}}
            await site.chat(model="many", tools=[tool], max_tokens=1)
            assert site.engine.requests[-1].prompt

    run(body())


def test_added_tokens(run: Any, open_site: Any, bring: Any, engine: Any) -> None:
    from dataclasses import replace

    engine.details = replace(engine.details, vocab_size=304)

    async def body() -> None:
        async with open_site() as site:
            files = {"tokenizer": extended("<|x|>", "<|y|>"), "template": "{{ messages[0].content }}<|x|>"}
            assert (await site.upload("own", bring("own", **files))).status_code == 201
            size = make_tokenizer().get_vocab_size()
            assert (await site.chat(model="own", max_tokens=1)).status_code == 200
            assert prompt_of(site)[-1] == size
            assert (await site.complete(prompt="a<|y|>", max_tokens=1)).status_code == 200
            assert size + 1 not in prompt_of(site), "the base has no such token"
            await site.complete(model="own", prompt="a<|y|>", max_tokens=1)
            assert prompt_of(site)[-1] == size + 1
            assert await text_of(site, [size, size + 1], "own") == "<|x|><|y|>"
            assert (await site.post("/detokenize", tokens=[size])).status_code == 400
            other = bring("other", seed=1, tokenizer=extended("<|z|>"))
            assert (await site.upload("other", other)).status_code == 201
            both = await site.complete(model="own", adapters=[{"name": "other"}])
            assert (both.status_code, both.json()["error"]["param"]) == (400, "adapters")

    run(body())


def test_the_bases_own_files_are_the_bases(run: Any, open_site: Any, bring: Any, model_folder: Path) -> None:
    async def body() -> None:
        async with open_site() as site:
            folder = bring("own")
            for name in TOKENIZER_FILES:
                if (model_folder / name).exists():
                    (folder / name).write_bytes((model_folder / name).read_bytes())
            assert (await site.upload("own", folder)).status_code == 201
            entry = await site.server.loaded.store.get("own")
            assert await site.server.loaded.codecs.of(entry.digest, entry.path) is site.server.loaded.codec

    run(body())


def hostile_tokenizers() -> dict[str, str]:
    slow, other = make_tokenizer(), make_tokenizer()
    slow.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    other.normalizer = normalizers.Replace(Regex("(a|a)*b"), "")
    vocabulary = json.loads(make_tokenizer().to_str())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    around = json.loads(make_tokenizer().to_str())
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 5000
    around["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0] * 5000, "tokens": ["<s>"] * 5000}},
    }  # fmt: skip
    return {
        "pre_tokenizer": slow.to_str(),
        "normalizer": other.to_str(),
        "model": json.dumps(vocabulary),
        "post_processor": json.dumps(around),
        "cannot be read": '{"model": 1}',
        "beyond the base's": extended("<|far|>"),
        "more than 1024": extended("x" * 2000),
    }


@pytest.mark.parametrize("reason", list(hostile_tokenizers()))
def test_other_tokenizers_are_refused(run: Any, open_site: Any, bring: Any, reason: str) -> None:
    async def body() -> None:
        async with open_site() as site:
            site.server.loaded.codecs._vocab_size = make_tokenizer().get_vocab_size()
            response = await site.upload("own", bring("own", tokenizer=hostile_tokenizers()[reason]))
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"] == "tokenizer.json"
            assert reason in error["message"]
            assert (await site.complete(model="own")).status_code == 404

    run(body())


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"template": "{% if"}, "chat_template.jinja"),
        ({"template": "{{ 9**(9**9) }}"}, "chat_template.jinja"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json"),
        ({"tokenizer_config": {"chat_template": 5}}, None),
        ({"tokenizer_config": {"chat_template": [{"name": "other", "template": "x"}]}}, "chat_template.jinja"),
        ({"tokenizer_config": {"eos_token": 5}}, "tokenizer_config.json"),
        ({"special_tokens_map": "[]"}, "special_tokens_map.json"),
    ],
)
def test_broken_files_are_refused(run: Any, open_site: Any, bring: Any, files: Any, param: str | None) -> None:
    async def body() -> None:
        async with open_site() as site:
            response = await site.upload("own", bring("own", **files))
            if param is None:
                assert response.status_code == 400
                return
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text

    run(body())


def test_an_endless_template_hurts_its_own_requests_alone(run: Any, open_site: Any, bring: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            assert (await site.upload("own", bring("own", template=ENDLESS))).status_code == 201
            site.server.loaded.codecs._workers.renderer._cpu_seconds = 0.2
            response = await site.chat(model="own")
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "chat_template"
            assert (await site.chat(max_tokens=1)).status_code == 200

    run(body())


def test_files_over_their_bounds_are_413(run: Any, open_site: Any, bring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZER_FILES, "chat_template.jinja", 10)  # type: ignore[call-overload]

    async def body() -> None:
        async with open_site() as site:
            response = await site.upload("own", bring("own", template="x" * 11))
            assert (response.status_code, response.json()["error"]["param"]) == (413, "chat_template.jinja")

    run(body())


def test_tokenizer_info_tells_of_the_model_named(run: Any, open_site: Any, bring: Any) -> None:
    async def body() -> None:
        async with open_site() as site:
            config = {"eos_token": "<s>"}
            assert (await site.upload("own", bring("own", template=OWN, tokenizer_config=config))).status_code == 201
            told = {
                model: (await site.http.get("/tokenizer_info", params={"model": model})).json()
                for model in ("base", "own", "own@1")
            }
            assert told["base"] == (await site.http.get("/tokenizer_info")).json()
            assert told["own"] == told["own@1"]
            assert (told["own"]["chat_template"], told["own"]["eos_token"]) == (OWN, "<s>")
            for query, status, param in (("model=nope", 404, "model"), ("model=", 400, "model"), ("x=1", 400, "x")):
                refused = await site.http.get(f"/tokenizer_info?{query}")
                assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text

    run(body())
