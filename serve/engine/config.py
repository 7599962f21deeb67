"""The engine's options, as plain data: the engine imports without the HTTP stack."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All that the engine process needs to start. Memory budgets are in GiB; None means: decide from the machine.

    kv_memory and adapter_memory alone are fixed sizes. With their ``_max`` they are ranges, inside which the sizes move
    with demand: each side keeps its lower bound and takes no more than the upper one.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    device: str = "auto"  # auto | cpu | cuda
    max_model_len: int | None = None
    max_batch_tokens: int = 2048
    max_num_seqs: int = 64
    page_size: int = 16
    prefix_caching: bool = True  # pages of earlier requests are found again by requests that begin alike
    max_step_stretch: float = 2.2  # times that a prompt's chunk may make a step longer for who decodes; 0: no bound
    tenant_weights: tuple[tuple[str, float], ...] = ()  # shares of tenants; 1 for those that are not named
    cuda_graphs: bool = True  # decode steps are captured and replayed, on CUDA
    deterministic: bool = False  # the bits of a request depend on nothing but the request
    kv_dtype: str = "auto"  # auto: the model's | fp8_e4m3: 8 bits an element and a scale for each token and head
    speculate: str = "off"  # off | ngram: drafts are what followed the latest tokens when they came last
    speculative_tokens: int = 4  # drafts of a sequence in a step
    ngram_min: int = 2  # tokens that must match, at least
    ngram_max: int = 4  # and at most: longer matches are tried first
    overlap: bool | None = None  # a step is delivered while the next one is computed; None: where it pays
    device_memory: float = 0.9  # share of the device that weights, pages and adapters may take together
    kv_memory: float | None = None
    kv_memory_max: float | None = None
    adapter_memory: float | None = None
    adapter_memory_max: float | None = None
    compiled_dir: str | None = None  # where compiled adapters are kept, one folder per digest; None: nowhere
    compiled_cache: float | None = None  # compiled adapters on disk; None: as many as leave it room
    host_cache: float | None = None  # packed adapters in host memory; 0: none


def overlaps(config: EngineConfig, device: str) -> bool:
    """Whether steps overlap. On a CPU host and device are the same cores, so there is nothing to hide, and sequences
    that end would compute a row too many. A deterministic step starts from tokens that the host knows, and so does
    one with drafts."""
    if config.deterministic or config.speculate != "off":
        return False
    return device.startswith("cuda") if config.overlap is None else config.overlap
