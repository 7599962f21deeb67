"""Fixtures of all suites: tiny checkpoints made on the spot, engines over them, log-probabilities through pages."""

from __future__ import annotations

import os
import time

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from onebase.adapters.base import Site, SiteKind
from onebase.serve.engine.chunk import Chunk
from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.engine import Engine
from onebase.serve.engine.layout import Layout
from onebase.serve.engine.messages import AdapterUse, Request, SamplingParams, TokenOutput
from onebase.serve.engine.sequence import Sequence
from onebase.serve.model.loader import load_model

VOCAB = 128
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_NO_KV = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
ARCHITECTURES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True),
    "llama_mha": lambda: transformers.LlamaConfig(**_NO_KV, attention_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL, head_dim=24),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=7),
    "gemma2": lambda: transformers.Gemma2Config(**_SMALL, head_dim=16, sliding_window=7, query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SMALL, head_dim=16, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**_SMALL),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2),
    "opt": lambda: transformers.OPTConfig(**_NO_KV, ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_NO_KV),
    "mixtral": lambda: transformers.MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_SMALL, head_dim=24, moe_intermediate_size=40, num_experts=5, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**_SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "olmo2": lambda: transformers.Olmo2Config(**_SMALL),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two test processes share two cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(architecture) -> folder of a tiny random model, made once a session."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            torch.manual_seed(len(architecture))
            model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
            for name, parameter in model.named_parameters():  # biases and norms too: nothing may be a no-op
                is_scale = parameter.dim() == 1 and name.endswith("weight")
                from_zero = architecture.startswith("gemma")  # their norms multiply by one plus the weight
                torch.nn.init.normal_(parameter, mean=float(is_scale and not from_zero), std=0.2)
            made[architecture] = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(made[architecture])
        return made[architecture]

    return make


@dataclass(eq=False)
class EngineDriver:
    """Drives an Engine by hand in a test."""

    engine: Engine
    sites: list[Site]
    made: int = 0
    outputs: dict[str, list[int]] = field(default_factory=dict)
    failures: dict[str, Any] = field(default_factory=dict)

    def base_sites(self) -> list[Site]:
        """The linear sites of the base."""
        return [site for site in self.sites if site.kind is SiteKind.LINEAR]

    def use(self, folder: Path, scale: float = 1.0) -> AdapterUse:
        """An adapter folder as a request names it; its path stands for the digest."""
        return AdapterUse(str(folder), str(folder), scale)

    def submit(self, prompt: list[int], *adapters: AdapterUse, **sampling: Any) -> str:
        """Add a request; greedy and without an end unless told otherwise."""
        self.made += 1
        options = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | sampling
        request = Request(f"r{self.made}", tuple(prompt), SamplingParams(**options), adapters)
        self._take(self.engine.add(request))
        return request.id

    def run(self, *, steps: int = 20_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(steps):
            if not self.engine.has_work:
                break
            self.step()
            if not self.engine.scheduler.running:
                time.sleep(0.001)  # an adapter is on its way
        assert not self.engine.has_work, "the engine did not finish"

    def step(self) -> None:
        self._take(self.engine.step())
        self.engine.check()

    def generate(self, prompt: list[int], *adapters: AdapterUse, **sampling: Any) -> list[int]:
        """The tokens of one request that runs alone."""
        request_id = self.submit(prompt, *adapters, **sampling)
        self.run()
        return self.outputs[request_id]

    def logprobs(self, jobs: list[tuple[list[int], tuple[AdapterUse, ...]]], chunk: int) -> list[dict[int, Tensor]]:
        """Feed every job's tokens in chunks, all jobs in one batch a step.

        Per job: position -> log-probabilities [vocabulary] after that position, at the end of each chunk. Positions
        are those of the job's own tokens: virtual ones stand before them.
        """
        requests = [Request(f"j{i}", tuple(tokens), SamplingParams(), uses) for i, (tokens, uses) in enumerate(jobs)]
        sequences = [Sequence.of(request, i) for i, request in enumerate(requests)]
        found: list[dict[int, Tensor]] = [{} for _ in jobs]
        pages = self.engine.scheduler.pages
        for sequence in sequences:
            sequence.adapters = tuple(self._resident(use) for use in sequence.request.adapters)
            if sequence.layout is None:
                uses = [(e.traits, u.scale) for e, u in zip(sequence.adapters, sequence.request.adapters, strict=True)]
                sequence.lay_out(Layout.of(sequence.request.prompt, uses))
            sequence.pages = pages.allocate(pages.pages_for(len(sequence.tokens))) or []
        while any(sequence.num_uncomputed for sequence in sequences):
            todo = [s for s in sequences if s.num_uncomputed]
            chunks = [Chunk(s, min(chunk, s.num_uncomputed), samples=True) for s in todo]
            chunks = self.engine.runner.in_adapter_order(chunks)
            logits = self.engine.runner.forward(chunks)
            assert logits is not None
            for row, done in zip(logits, chunks, strict=True):
                done.sequence.num_computed += done.num_tokens
                position = done.sequence.num_computed - 1 - done.sequence.num_virtual
                if position >= 0:
                    found[done.sequence.order][position] = torch.log_softmax(row.float(), -1)
        for sequence in sequences:
            pages.free(sequence.pages)
            for use in sequence.request.adapters:
                self.engine.adapters.release(use.digest)
        return found

    def _resident(self, use: AdapterUse) -> Any:
        entry = self.engine.adapters.fetch(use.digest, use.path)
        while entry.state not in ("ready", "failed"):
            self._take(self.engine.step())
        assert entry.error is None, entry.error
        return self.engine.adapters.acquire(use.digest)

    def _take(self, outputs: list[Any]) -> None:
        for output in outputs:
            if isinstance(output, TokenOutput):
                self.outputs.setdefault(output.id, []).extend(output.tokens)
            else:
                self.failures[output.id] = output


@pytest.fixture(scope="session")
def make_driver(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., EngineDriver]]:
    """make_driver(architecture, **engine options) -> a driver over a fresh engine; its books are checked at the end."""
    drivers: list[EngineDriver] = []

    def make(architecture: str, **options: Any) -> EngineDriver:
        defaults = {"dtype": "float32", "device": "cpu", "page_size": 8, "kv_memory": 0.01, "adapter_memory": 0.05}
        defaults |= {"host_cache": 0.0, "max_step_stretch": 0.0}  # chunks do not follow from what steps took
        config = EngineConfig(model=str(checkpoint(architecture)), **(defaults | options))
        base = load_model(config)
        drivers.append(EngineDriver(Engine(config, base), [entry.site for entry in base.probed]))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.engine.check()
        driver.engine.close()


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases on the CPU get what they would on CUDA: Triton's bodies, interpreted, and products of plain weights."""
    from onebase.kernels import prepack
    from onebase.serve.model import fused, norms

    for module in (norms, fused):
        monkeypatch.setattr(module, "uses_triton", lambda tensor: True)
    monkeypatch.setattr(prepack, "supported", lambda dtype: False)
