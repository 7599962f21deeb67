"""A fake engine, a tiny byte-level tokenizer, and the application around them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onebase.adapters.errors import EngineDead
from onebase.serve.api.app import create_app
from onebase.serve.config import Settings
from onebase.serve.engine.inprocess import InProcessEngine
from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
    AdapterUse,
    EngineInfo,
    EngineStats,
    Request,
    TokenOutput,
)

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('no boom') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = ["hello world, hello there", "the quick brown fox", "assistant: user: system:"]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with all bytes, two special tokens (0 <s>, 1 </s>) and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


class FakeEngine:
    """Replies with the prompt's own tokens, over and over; the attributes bend that."""

    def __init__(self) -> None:
        self.details = EngineInfo("llama", "f" * 64, "cpu", "float32", 300, 256, 16, 100, 1 << 20, (1,))
        self.info: EngineInfo | None = None
        self.ready = False
        self.restarts = 0
        self.stats = EngineStats()
        self.requests: list[Request] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.reply: Callable[[Request], list[TokenOutput]] = echo
        self.delay = 0.0
        self.die_after: int | None = None
        self.failure: Exception | None = None
        self.load_failure: Exception | None = None
        self.start_failure: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.pause: asyncio.Event | None = None
        self.stopped = False
        self.pins: tuple[AdapterUse, ...] = ()
        self.on_ready: list[Callable[[], None]] = []

    async def start(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.start_failure is not None:
            raise self.start_failure
        self.info, self.ready = self.details, True
        for hook in self.on_ready:
            hook()

    async def stop(self) -> None:
        self.ready, self.stopped = False, True

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        try:
            if self.pause is not None:
                await self.pause.wait()
            for count, output in enumerate(self.reply(request)):
                if self.die_after is not None and count >= self.die_after:
                    self.ready = False
                    self.finished.append(request.id)
                    raise EngineDead("The engine died.")
                await asyncio.sleep(self.delay)
                if output.finish_reason is not None:
                    self.finished.append(request.id)
                yield output
        finally:
            if request.id not in self.finished:
                self.aborted.append(request.id)

    async def load_adapter(self, use: AdapterUse) -> AdapterReady:
        if self.load_failure is not None:
            raise self.load_failure
        self.stats = replace(self.stats, resident={**self.stats.resident, use.digest: 64})
        return AdapterReady("1", use.digest, "LORA", 2, 64, 1)

    async def unload_adapter(self, digest: str, *, force: bool = False) -> AdapterGone:
        resident = dict(self.stats.resident)
        gone = resident.pop(digest, None) is not None
        self.stats = replace(self.stats, resident=resident)
        return AdapterGone("1", digest, gone)

    def set_pins(self, uses: Sequence[AdapterUse]) -> None:
        self.pins = tuple(uses)

    def tier(self, digest: str) -> str:
        return "device" if digest in self.stats.resident else "disk"


def echo(request: Request) -> list[TokenOutput]:
    prompt = request.prompt
    return reply_with([prompt[i % len(prompt)] for i in range(request.sampling.max_tokens)], "length")(request)


def reply_with(tokens: list[int], reason: Any = "stop") -> Callable[[Request], list[TokenOutput]]:
    """One token at a time; the last one ends the sequence."""
    last = len(tokens) - 1
    return lambda request: [TokenOutput(request.id, (t,), reason if i == last else None) for i, t in enumerate(tokens)]


def _files_of(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", (file.name, file.read_bytes())) for file in sorted(folder.iterdir())]


class Site:
    """A running application: httpx client, fake engine, settings, tokenizer."""

    def __init__(self, settings: Settings, engine: FakeEngine) -> None:
        self.engine = engine
        self.app = create_app(settings, engine)  # type: ignore[arg-type]
        self.server = self.app.state.server
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://localhost"
        )

    async def settled(self) -> None:
        """Until start-up has ended, well or badly."""
        done = asyncio.Event()
        self.server.on_ready.append(done.set)
        self.server.on_failure.append(done.set)
        if self.server.loaded is None and self.server.failure is None:
            await done.wait()

    async def idle(self) -> None:
        """Until what the store does in the background is done."""
        async with asyncio.timeout(10):
            while self.server.loaded.store._tasks:
                await asyncio.sleep(0.001)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", **{"model": "base", "prompt": "hello", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        return await self.post("/v1/chat/completions", **{"model": "base", "messages": messages, **body})

    async def upload(self, name: str, folder: Path, **headers: str) -> httpx.Response:
        """The folder's files as one form."""
        return await self.http.post("/v1/adapters", data={"name": name}, files=_files_of(folder), headers=headers)

    def encode(self, text: str) -> list[int]:
        return list(self.server.loaded.codec.backend.encode(text).ids)


@asynccontextmanager
async def running_site(settings: Settings, engine: FakeEngine, *, wait: bool = True) -> AsyncIterator[Site]:
    site = Site(settings, engine)
    async with site.app.router.lifespan_context(site.app), site.http:
        if wait:
            await site.settled()
            assert site.server.failure is None, site.server.failure
        yield site


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as far as the API side reads it: tokenizer, template and config."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    fast = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    LlamaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_model_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    folder = tmp_path_factory.mktemp("bare")
    for file in model_folder.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def settings_for(model_folder: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(**options: Any) -> Settings:
        given = {"model": str(model_folder), "served_model_name": "base", "data_dir": tmp_path / "data", **options}
        return Settings(**given)

    return make


@pytest.fixture
def open_site(settings_for: Callable[..., Settings], engine: FakeEngine) -> Callable[..., Any]:
    """open_site(wait=True, **settings) as an async context manager."""

    def make(*, wait: bool = True, **options: Any) -> Any:
        return running_site(settings_for(**options), engine, wait=wait)

    return make


@pytest.fixture
def replies() -> Callable[..., Callable[[Request], list[TokenOutput]]]:
    return reply_with


@pytest.fixture
def run() -> Callable[[Any], Any]:
    """Runs a coroutine under a deadline of its own."""

    def runner(work: Any) -> Any:
        return asyncio.run(asyncio.wait_for(work, 60))

    return runner


@pytest.fixture(scope="session")
def make_lora_files() -> Callable[..., Path]:
    """make_lora_files(folder, seed, width): a small LoRA in PEFT's format, for a base of this width."""
    return _lora_files


def _lora_files(folder: Path, seed: int, width: int = 8) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": torch.randn(2, width), f"{key}.lora_B.weight": torch.randn(width, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Callable[..., Path]:
    """adapter_folder(name, seed): a small LoRA folder in PEFT's format."""

    def make(name: str = "lora", seed: int = 0) -> Path:
        return _lora_files(tmp_path / "adapters" / name, seed)

    return make


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the tokenizer above."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("real")
    fast = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def open_real(real_folder: Path, settings_for: Callable[..., Settings]) -> Callable[..., Any]:
    """open_real(**settings): the application over a real engine in a thread."""

    def make(**options: Any) -> Any:
        small = {"dtype": "float32", "device": "cpu", "kv_memory": 0.01, "adapter_memory": 0.01}
        settings = settings_for(**{"model": str(real_folder), **small, **options})
        return running_site(settings, InProcessEngine(settings.engine_config()))  # type: ignore[arg-type]

    return make
