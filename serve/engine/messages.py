"""What the API side and the engine say to each other. Plain dataclasses: wire.py gives them a binary form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter on one request. ``path`` is the blob folder, read only if the digest is not resident.

    name: what the request calls it, for messages.
    """

    digest: str
    path: str
    scale: float = 1.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match. source: a JSON schema, a regular expression, or a grammar in Lark's notation.

    param: the field that it came from, for errors; grammars are equal without it.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    param: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens. temperature 0 is greedy; top_k 0 and top_p 1 are off; seed is always set by the API side.

    max_tokens 0: the prompt is computed, and no token follows. logprobs, prompt_logprobs: how many alternatives to tell
    beside each generated token and each token of the prompt; None: tell nothing.

    logit_bias: (token, what is added to its logit). presence_penalty and frequency_penalty: subtracted from the logits
    of tokens that were generated, once and for each time. repetition_penalty: divides positive and multiplies negative
    logits of tokens of the prompt and of the answer (arXiv:1909.05858). min_tokens: neither an end token nor a stop
    token is drawn before so many.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. n > 1 and several prompts are several requests.

    tenant: whose it is, for fair sharing and for the prefix cache: tenants share no pages. priority: lower runs
    earlier. timeout: seconds after which it fails, from when the engine got it; None: never. cache_salt: requests share
    pages only with those of the same salt.

    classifies: the head of one of its adapters reads the prompt, and no token follows; max_tokens must be 0.
    embeds: the hidden states of its prompt's last token, or the mean of all of them, are wanted; the same holds.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    classifies: bool = False
    tenant: str = ""
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""
    embeds: Pooling | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of consecutive tokens as arrays in the machine's byte order; logprobs.py makes and reads them.

    width: alternatives of each token. tokens, ranks: int32 [n]; chosen: float32 [n]; top_tokens: int32 [n, width] and
    top: float32 [n, width], likeliest first.
    """

    width: int
    tokens: bytes
    chosen: bytes
    ranks: bytes
    top_tokens: bytes
    top: bytes


@dataclass(frozen=True, slots=True)
class ClassLogits:
    """What a classification head gave: float32 [n, num_labels] in the machine's byte order. per_token: of consecutive
    tokens of the prompt; otherwise n is 1, of the whole prompt."""

    num_labels: int
    per_token: bool
    logits: bytes


@dataclass(slots=True)
class TokenOutput:
    """New tokens of one request. The last output of a request has a finish_reason.

    logprobs: of these tokens. prompt_logprobs: of the next tokens of the prompt, from its second on; they come in as
    many outputs as the prompt has chunks, all of them before the first token. cached_tokens: tokens of the prompt that
    the prefix cache gave; said with the first token. classes: of a request that classifies; as many outputs as the
    chunks whose tokens are spoken of, all of them before the last output. embedding: float32 [width of the model] in
    the machine's byte order, in the last output of a request that embeds.

    Nobody changes one. It is not frozen because every step makes one for each row, at several times the price.
    """

    id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    cached_tokens: int = 0
    classes: ClassLogits | None = None
    embedding: bytes | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A request or an adapter command failed. ``kind`` is the name of the exception class in adapters/errors.py."""

    id: str
    kind: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Compile the blob and make it resident. Answered by AdapterReady or Failure with the same id."""

    id: str
    use: AdapterUse


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Drop the adapter from device and host memory, once no running request uses it. Answered by AdapterGone.

    force: requests over it, running and waiting, fail with AdapterUnloaded; so it goes at once.
    """

    id: str
    digest: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class SetPins:
    """All adapters that are to be on the device whatever the traffic: loaded, and never evicted. Replaces the last one.

    Not answered: what could not be loaded or has no room is told in EngineStats.
    """

    uses: tuple[AdapterUse, ...]


Command = Request | LoadAdapter | UnloadAdapter | SetPins | str  # a str: abort this request


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """What the compiled adapter is. nbytes: what it takes on the device."""

    id: str
    digest: str
    family: str
    rank: int
    nbytes: int
    sites: int


@dataclass(frozen=True, slots=True)
class AdapterGone:
    """Sent once the bytes are back. ``was_resident`` is False where there was nothing to drop.

    aborted: how many requests failed for it.
    """

    id: str
    digest: str
    was_resident: bool
    aborted: int = 0


@dataclass(frozen=True, slots=True)
class HostChanges:
    """Adapters that came to host memory, and that left it, since the last one: there may be thousands, so they are not
    in every EngineStats."""

    added: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """What takes so many bytes of the device. what: a word for metrics; note: for people."""

    what: str
    nbytes: int
    note: str

    def __str__(self) -> str:
        return f"{self.what:<14} {self.nbytes / (1 << 30):9.2f} GiB  {self.note}"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Said once, when the engine can serve. num_pages and adapter_bytes: at the start; they move within the bounds (at
    least, at most). memory: the whole budget, row by row."""

    architecture: str
    fingerprint: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    adapter_bytes: int
    eos_token_ids: tuple[int, ...]
    page_bounds: tuple[int, int] = (0, 0)
    adapter_byte_bounds: tuple[int, int] = (0, 0)
    memory: tuple[MemoryRow, ...] = ()


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier of adapters. bytes, adapters: that are there now; capacity: bytes, 0 where it has no limit.

    hits, misses: of what was looked for there: on the device by each request, in host memory where it was not on the
    device, on disk (its compiled form) where it was in neither. evictions: for want of room.
    """

    bytes: int = 0
    capacity: int = 0
    adapters: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class Seconds:
    """A histogram of durations: counts[i] took no longer than LOAD_BUCKETS[i] (adapters/tiers/meters.py), and longer
    than the one before; the last count is of all that took longer."""

    counts: tuple[int, ...] = ()
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges after a step; counters are totals since the engine started. resident: digest -> bytes on the device.

    num_pages, adapter_bytes: what pages and adapters have now of the device's budget; budget_moves: how often that
    changed. free_pages: nobody holds them; cached_pages: those of them that the prefix cache can still give.
    prompt_tokens: of prompts, computed; queried_tokens: of prompts, looked for in the prefix cache; cached_tokens: of
    these, found there and not computed. load_seconds: by step of a load: ``read`` (compiled form -> host), ``compile``
    (files -> host), ``copy`` (host -> device), ``wait`` (asked for -> ready). pinned: digests that are on the device to
    stay; pinned_bytes: what they take; pins_waiting: those that could not be loaded, or have no room.
    compiled_failures: compiled forms that could not be read or written. memory_failures: forwards for which there was
    no memory. drafted_tokens: computed as guesses of what comes; accepted_tokens: of them, those that were drawn and
    used.
    """

    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    page_evictions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    memory_failures: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    num_pages: int = 0
    adapter_bytes: int = 0
    budget_moves: int = 0
    adapter_bytes_used: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    device: TierStats = TierStats()
    host: TierStats = TierStats()
    disk: TierStats = TierStats()
    load_seconds: dict[str, Seconds] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    pinned_bytes: int = 0
    pins_waiting: tuple[str, ...] = ()
    compiled_failures: int = 0
