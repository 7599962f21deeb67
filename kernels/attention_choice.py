"""Which attention a GPU gets: the Triton body, or a library's kernel where it was faster on this device and as right.

For each kind of layer, prompts and decoding are tried at start, on pages of their own. A library that raises, or whose
result differs from the Triton body's, is not used for that kind; the start never fails for it.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.kernels.attention import AttentionBatch, AttentionOptions, PageCache, check_shapes
from onebase.kernels.attention_libraries import FlashInfer, Kind, Library, VarlenPrompts
from onebase.kernels.attention_triton import TritonAttention, write_pages
from onebase.kernels.pages import LayerShape

log = logging.getLogger("onebase.kernels")

Clock = Callable[[Callable[[], Tensor]], float]
_ROUNDS = 5
_CLOSE = 2e-2  # largest difference from the Triton body, for values of about one in half precision
_PROMPTS, _DECODING = (512, 512, 1024), (1,) * 32
_DECODING_KEYS = 512


@dataclass(frozen=True, slots=True)
class MeasuredAttention:
    """triton: serves whatever no library does, and every captured step. chosen: by kind of layer and role."""

    triton: TritonAttention
    libraries: tuple[Library, ...]
    clock: Clock
    chosen: dict[Kind, Library]
    name: str = "measured"
    is_capturable: bool = True

    @classmethod
    def on(cls, device: torch.device) -> MeasuredAttention:
        """With the libraries that are installed."""
        found: list[Library] = []
        makers: tuple[Callable[[], Library], ...] = (VarlenPrompts.installed, lambda: FlashInfer.installed(device))
        for make in makers:
            try:
                found.append(make())
            except Exception as error:  # whatever an installation breaks with
                log.info("attention: a library is not used: %s: %s", type(error).__name__, error)
        return cls(TritonAttention.on(device), tuple(found), cuda_seconds, {})

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PageCache, batch: AttentionBatch, options: AttentionOptions
    ) -> Tensor:
        library = None if batch.is_fixed else self.chosen.get(_kind(q.shape[1], cache, options, _decodes(batch)))
        if library is None:
            return self.triton(q, k, v, cache, batch, options)
        return self._by(library, q, k, v, cache, batch, options)

    def warm_up(self, num_heads: int, cache: PageCache, options: AttentionOptions) -> None:
        self.triton.warm_up(num_heads, cache, options)
        for lengths, keys in ((_PROMPTS, 0), (_DECODING, _DECODING_KEYS)) if self.libraries else ():
            trial = _Trial.of(num_heads, cache, options, lengths, keys)
            best = self._fastest(trial)
            if best is not None:
                self.chosen[_kind(num_heads, cache, options, _decodes(trial.batch))] = best

    def _fastest(self, trial: _Trial) -> Library | None:
        """None for the Triton body."""
        best, seconds = None, self.clock(lambda: trial.run(self.triton))
        wanted = trial.run(self.triton)
        for library in self.libraries:
            try:
                taken = self._time(library, trial, wanted)
            except Exception as error:  # a library's own checks, a missing kernel, a build that does not match
                log.info("attention: %s is not used: %s: %s", library.name, type(error).__name__, error)
                continue
            if taken < seconds:
                best, seconds = library, taken
        return best

    def _time(self, library: Library, trial: _Trial, wanted: Tensor) -> float:
        """Raises ValueError where it has nothing to do here, or is not right."""
        if not library.sequences(trial.batch, trial.cache, trial.options):
            raise ValueError("it does not do this kind of layer")

        def run() -> Tensor:
            return trial.run(lambda *args: self._by(library, *args))

        worst = float((run().float() - wanted.float()).abs().max())
        if not worst <= _CLOSE:
            raise ValueError(f"it differs from the Triton body by {worst:.3g}")
        return self.clock(run)

    def _by(
        self,
        library: Library,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: PageCache,
        batch: AttentionBatch,
        options: AttentionOptions,
    ) -> Tensor:
        """The library for its sequences, the Triton body for the others."""
        done = library.sequences(batch, cache, options)
        if not done:
            return self.triton(q, k, v, cache, batch, options)
        check_shapes(q, k, v, cache, batch, options)
        write_pages(k, v, cache, batch)
        out = library.attend(q, k, v, cache, batch, options)
        others = sorted(set(range(batch.num_seqs)) - set(done))
        if others:
            self.triton.attend(q, out, cache, batch, options, others)
        return out


Body = Callable[[Tensor, Tensor, Tensor, PageCache, AttentionBatch, AttentionOptions], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """A step that bodies are tried with."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: PageCache
    batch: AttentionBatch
    options: AttentionOptions

    @classmethod
    def of(
        cls, num_heads: int, cache: PageCache, options: AttentionOptions, lengths: Sequence[int], keys: int
    ) -> _Trial:
        """Sequences of these new tokens after ``keys`` older ones, whose K and V are noise."""
        size, device = cache.page_size, cache.data.device
        counts = [-(-(length + keys) // size) for length in lengths]
        shape = LayerShape(cache.num_kv_heads, cache.head_dim, cache.dtype, device, cache.fp8)
        own = PageCache.of_shape(shape, size, sum(counts))
        firsts = [sum(counts[:at]) for at in range(len(counts))]
        pages = [range(first, first + count) for first, count in zip(firsts, counts, strict=True)]
        batch = AttentionBatch.build(lengths, [length + keys for length in lengths], pages, size, device)
        q, k, v = (_noise(batch.num_tokens, heads, cache) for heads in (num_heads, *[cache.num_kv_heads] * 2))
        every = torch.arange(sum(counts) * size, device=device)
        own.write(every, _noise(len(every), cache.num_kv_heads, cache), _noise(len(every), cache.num_kv_heads, cache))
        return cls(q, k, v, own, batch, options)

    def run(self, body: Body) -> Tensor:
        return body(self.q, self.k, self.v, self.cache, self.batch, self.options)


def _noise(rows: int, heads: int, cache: PageCache) -> Tensor:
    generator = torch.Generator().manual_seed(rows + heads)
    host = torch.randn(rows, heads, cache.head_dim, generator=generator)
    return host.to(cache.data.device, cache.dtype)


def _kind(num_heads: int, cache: PageCache, options: AttentionOptions, decodes: bool) -> Kind:
    shape = (num_heads, cache.num_kv_heads, cache.head_dim, cache.dtype, cache.fp8)
    return (*shape, options.window, options.softcap, options.sinks is None, decodes)


def _decodes(batch: AttentionBatch) -> bool:
    return max(batch.query_lens) == 1


def cuda_seconds(run: Callable[[], Tensor]) -> float:
    """Median device time of a run."""
    run()
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
        milliseconds: float = start.elapsed_time(stop)
        times.append(milliseconds / 1e3)
    return statistics.median(times)
