"""Every attention body against a dense float64 oracle written here, over random layouts with poisoned pages.

Whatever a sequence does not own is NaN: pages of others, free pages, the unused tail of its last page. 0 * NaN is NaN,
so a body that merely gives such slots weight zero fails.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onebase.kernels import attention_cpu_plan, kv_fp8
from onebase.kernels.attention import AttentionBatch, AttentionBody, AttentionOptions, PageCache, select_attention
from onebase.kernels.pages import LayerShape, SlotLayout

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LOOSE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="set TRITON_INTERPRET=1 (make test does) or run on CUDA")
BODIES = ["reference", "blocks", "cpu", "native", pytest.param("triton", marks=needs_interpreter)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """One step: per sequence (new tokens, tokens in all), and the layer's shape and options."""

    lens: tuple[tuple[int, int], ...]
    page_size: int = 16
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    spread: float = 1.0  # standard deviation of the logits, roughly
    fp8: bool = False  # pages hold 8 bits an element
    slots: bool = False  # the layer's pages lie in slots, between those of other layers
    seed: int = 0

    @property
    def query_lens(self) -> list[int]:
        return [query_len for query_len, _ in self.lens]

    @property
    def kv_lens(self) -> list[int]:
        return [kv_len for _, kv_len in self.lens]


class World:
    """A case laid out in memory: packed inputs, the full history of each sequence, and pages with the cached part."""

    def __init__(self, case: Case, device: torch.device = CPU) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(case.seed)
        heads = case.kv_heads * case.group
        num_tokens = sum(case.query_lens)
        # q, k and v are slices of one fused projection, as the model hands them over
        qkv = torch.randn(num_tokens, heads + 2 * case.kv_heads, case.dim, generator=generator, dtype=torch.float64)
        qkv[:, :heads] *= case.spread
        self.q, self.k, self.v = qkv.to(device, case.dtype).split([heads, case.kv_heads, case.kv_heads], dim=1)
        sinks = torch.randn(heads, generator=generator).to(device) if case.sinks else None
        self.options = AttentionOptions(case.dim**-0.5, case.window, case.softcap, sinks)
        self.pages = self._scatter_pages()
        self.history = [self._history(i, generator) for i in range(len(case.lens))]

    def _scatter_pages(self) -> list[list[int]]:
        counts = [-(-kv_len // self.case.page_size) for kv_len in self.case.kv_lens]
        self.num_pages = sum(counts) + 3
        order = list(range(self.num_pages))
        random.Random(self.case.seed).shuffle(order)
        return [[order.pop() for _ in range(count)] for count in counts]

    def _history(self, i: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """All K and V of sequence i: [kv_len, KV, D] each; the last query_len are the packed ones."""
        query_len, kv_len = self.case.lens[i]
        start = sum(self.case.query_lens[:i])
        shape = (2, kv_len - query_len, self.case.kv_heads, self.case.dim)
        old = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.case.dtype)
        keys, values = (
            torch.cat([o, new[start : start + query_len]]) for o, new in zip(old, (self.k, self.v), strict=True)
        )
        return (keys, values) if not self.case.fp8 else (_rounded(keys), _rounded(values))

    def batch(self) -> AttentionBatch:
        return AttentionBatch.build(
            self.case.query_lens, self.case.kv_lens, self.pages, self.case.page_size, self.device
        )

    def cache(self, poison: float = float("nan")) -> PageCache:
        """Poisoned everywhere but at the cached tokens of each sequence."""
        case = self.case
        cache = self._slots(poison) if case.slots else self._plain()
        _fill(cache, poison)
        for (query_len, kv_len), pages, (keys, values) in zip(case.lens, self.pages, self.history, strict=True):
            for position in range(kv_len - query_len):
                page, offset = pages[position // case.page_size], position % case.page_size
                place = torch.tensor([page], device=self.device), torch.tensor([offset], device=self.device)
                cache.put(*place, torch.stack((keys[position], values[position]))[:, None])
        return cache

    def _plain(self) -> PageCache:
        return PageCache.of_shape(self.shape, self.case.page_size, self.num_pages)

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.case.kv_heads, self.case.dim, self.case.dtype, self.device, self.case.fp8)

    def _slots(self, poison: float) -> PageCache:
        """The second of three layers of different shapes and types, all of them poisoned."""
        case = self.case
        others = [LayerShape(1, 24, torch.float64, self.device), LayerShape(2, 8, torch.float32, self.device)]
        shapes = [others[0], self.shape, others[1]]
        layout = SlotLayout.of(shapes, case.page_size)
        self.buffer = torch.zeros(self.num_pages * layout.nbytes, dtype=torch.uint8, device=self.device)
        self.layers = [
            PageCache.within(self.buffer, one, case.page_size, self.num_pages, offset, layout.nbytes)
            for one, offset in zip(shapes, layout.offsets, strict=True)
        ]
        for layer in self.layers:
            _fill(layer, poison)
        return self.layers[1]

    def expected(self) -> Tensor:
        """Dense attention in float64, one query row at a time."""
        rows = []
        start = 0
        for (query_len, kv_len), (keys, values) in zip(self.case.lens, self.history, strict=True):
            for i in range(query_len):
                position = kv_len - query_len + i
                low = 0 if self.case.window is None else max(0, position - self.case.window + 1)
                rows.append(self._row(self.q[start + i], keys[low : position + 1], values[low : position + 1]))
            start += query_len
        return torch.stack(rows)

    def _row(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (x.double().repeat_interleave(self.case.group, dim=1) for x in (keys, values))
        logits = (q.double() * keys).sum(-1).T * self.options.scale  # [H, visible]
        if self.options.softcap is not None:
            logits = self.options.softcap * (logits / self.options.softcap).tanh()
        weights = logits.exp()
        total = weights.sum(-1, keepdim=True)
        if self.options.sinks is not None:
            total = total + self.options.sinks.double().exp()[:, None]
        return torch.einsum("hj,jhd->hd", weights / total, values.double())


def _rounded(x: Tensor) -> Tensor:
    return kv_fp8.decode(*kv_fp8.encode(x), x.dtype)


def _fill(cache: PageCache, poison: float) -> None:
    """In fp8 the exponent of NaN, whatever the poison."""
    if cache.exponents is None:
        cache.data.fill_(poison)
    else:
        cache.data.fill_(1)
        cache.exponents.fill_(kv_fp8.NOT_FINITE)


def run(body: AttentionBody, world: World, cache: PageCache | None = None) -> Tensor:
    """Runs where freshly allocated memory is poisoned: rows that a body forgets are NaN."""
    cache = cache or world.cache()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return body(world.q, world.k, world.v, cache, world.batch(), world.options)
    finally:
        torch.use_deterministic_algorithms(False)


def check(name: str, case: Case, device: torch.device = CPU) -> None:
    world = World(case, device)
    got, want = run(select_attention(device, name), world), world.expected()
    assert got.dtype == case.dtype
    assert got.shape == want.shape
    error = (got.double() - want).abs().max() / max(1.0, want.abs().max())
    wide = case.spread * (1 if case.softcap is None else 3)  # tanh by a sigmoid is exact to an epsilon of the cap
    assert error <= TOLERANCE[case.dtype] * (1 if case.dtype.itemsize == 2 else wide), f"{case}: {error}"


def cases(max_len: int, max_seqs: int, dims: list[int], dtypes: list[torch.dtype]) -> st.SearchStrategy[Case]:
    kv_len = st.integers(1, max_len)
    length = kv_len.flatmap(lambda n: st.tuples(st.one_of(st.just(1), st.just(n), st.integers(1, n)), st.just(n)))
    drawn = st.builds(
        Case,
        lens=st.lists(length, min_size=1, max_size=max_seqs).map(tuple),
        page_size=st.sampled_from([8, 16, 32]),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 2, 3, 7]),
        dim=st.sampled_from(dims),
        dtype=st.sampled_from(dtypes),
        window=st.none() | st.integers(1, max_len),
        softcap=st.none() | st.sampled_from([1.5, 30.0]),
        sinks=st.booleans(),
        fp8=st.booleans(),
        slots=st.booleans(),
        seed=st.integers(0, 1 << 20),
    )
    # Pages in fp8 are decoded to at most float32; no model is served in float64.
    return drawn.map(lambda case: replace(case, fp8=case.fp8 and case.dtype != torch.float64))


CPU_DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@settings(LOOSE, max_examples=20)
@given(cases(40, 4, [8, 16], CPU_DTYPES))
def test_reference_is_dense_attention(case: Case) -> None:
    check("reference", case)


@settings(LOOSE, max_examples=120)
@given(cases(150, 8, [8, 64, 80], CPU_DTYPES))
def test_cpu_is_dense_attention(case: Case) -> None:
    check("cpu", case)


@needs_interpreter
@settings(LOOSE, max_examples=15)
@given(cases(40, 3, [8, 24, 64], [torch.float32, torch.bfloat16]))
def test_triton_is_dense_attention(case: Case) -> None:
    check("triton", case)


MIXED = Case(lens=((1, 130), (1, 5), (33, 33), (40, 100), (1, 1), (1, 64), (33, 33), (7, 20)), dim=32)
SMALL = Case(lens=((1, 21), (9, 9), (5, 18), (1, 1)), page_size=8, dim=16)
NAMED = [
    pytest.param(replace(MIXED, group=3, kv_heads=3), id="mixed"),
    pytest.param(replace(MIXED, dtype=torch.bfloat16, dim=64), id="mixed-bf16"),
    pytest.param(replace(MIXED, dtype=torch.bfloat16, dim=64, spread=8.0), id="large-logits-bf16"),
    pytest.param(replace(SMALL, dtype=torch.float16), id="fp16"),
    pytest.param(replace(SMALL, window=1), id="window-1"),
    pytest.param(replace(MIXED, window=17, page_size=8), id="window-over-pages"),
    pytest.param(replace(MIXED, window=10_000), id="window-wider-than-context"),
    pytest.param(replace(SMALL, softcap=2.0, spread=4.0), id="softcap"),
    pytest.param(replace(SMALL, sinks=True, window=4, group=4, kv_heads=1), id="sinks-and-window"),
    pytest.param(replace(SMALL, page_size=128), id="page-128"),
    pytest.param(replace(SMALL, dim=96, group=1), id="dim-96-no-groups"),
    pytest.param(replace(MIXED, dtype=torch.bfloat16, slots=True, group=3), id="slots"),
    pytest.param(replace(MIXED, fp8=True, kv_heads=3), id="fp8"),
    pytest.param(replace(MIXED, fp8=True, dtype=torch.bfloat16, slots=True, dim=64, window=40), id="fp8-slots"),
    pytest.param(replace(SMALL, fp8=True, dtype=torch.float16, sinks=True, softcap=9.0), id="fp8-fp16"),
]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("case", NAMED)
def test_body_is_dense_attention(name: str, case: Case) -> None:
    check(name, case)


def test_cpu_long_and_short_sequences_together() -> None:
    """Lengths far apart fall into several decode buckets; the rows come back in the caller's order."""
    lens = tuple((1, n) for n in (3, 1900, 40, 1200, 64, 1899, 17))
    check("cpu", Case(lens=lens, kv_heads=3, group=3, dim=64, dtype=torch.bfloat16))
    check("cpu", Case(lens=((600, 600), *lens[:3], (300, 900)), kv_heads=1, group=3, dim=64, window=250))


def test_bf16_logits_keep_float32_precision() -> None:
    """Logits of +-40 rounded to bf16 are off by 0.1; the weights would be off by 10 %."""
    world = World(Case(lens=((1, 200),) * 4, dim=64, dtype=torch.bfloat16, spread=10.0))
    got, want = run(select_attention(CPU, "cpu"), world), world.expected()
    assert (got.double() - want).norm() / want.norm() < 0.004


def test_cpu_masks_too_large_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu_plan, "KEPT_MASK_ITEMS", 100)
    check("cpu", Case(lens=((40, 40), (70, 150)), kv_heads=1, group=7, dim=32, window=30))


@needs_interpreter
def test_triton_splits_long_contexts() -> None:
    """Split-KV decoding, with more splits than some sequences have keys for, in a step with a prompt."""
    from onebase.kernels.attention_triton import TritonAttention

    case = Case(lens=((1, 300), (1, 3), (9, 9), (1, 129)), kv_heads=1, group=3, dim=24, sinks=True, softcap=20.0)
    for world in (World(case), World(replace(case, window=140, sinks=False))):
        for body in (TritonAttention(processors=16, split_tokens=32), TritonAttention(processors=64, split_tokens=8)):
            got = run(body, world)  # the second has 37 splits: more than one reduction loads at once
            assert (got.double() - world.expected()).abs().max() < 5e-6


@pytest.mark.parametrize(("window", "splits"), [(None, 64), (1024, 4), (200_000, 64)])
def test_triton_splits_by_the_longest_row(window: int | None, splits: int) -> None:
    """Whichever row it is, and by no more keys than a window leaves."""
    from onebase.kernels.attention_triton import TritonAttention

    cache = PageCache.allocate(1, 16, 1, 16, torch.float32, CPU)
    for kv_lens in ((20, 100_000), (100_000, 20)):
        batch = AttentionBatch.build([1, 1], kv_lens, [[0] * 6250] * 2, 16, CPU)
        (launch,) = TritonAttention(processors=132)._launches(batch, cache, 1, window, [0, 1])
        assert launch.splits == splits


@pytest.mark.parametrize("name", BODIES)
def test_touches_no_other_layer(name: str) -> None:
    """Layers whose pages share slots with this one's, and what lies between slots, stay as they were."""
    world = World(replace(SMALL, slots=True))
    cache = world.cache(poison=123.0)
    cache.data.zero_()
    before = world.buffer.clone()
    run(select_attention(CPU, name), world, cache)
    assert not torch.equal(world.buffer, before)
    cache.data.zero_()
    assert torch.equal(world.buffer, before)


@pytest.mark.parametrize("name", BODIES)
def test_slots_beyond_two_thousand_million_elements(name: str) -> None:
    """Places are computed in 64 bits. Of the 5 GiB only the few pages in use are ever touched."""
    num_slots, slot_bytes = 80, 1 << 26
    world = World(replace(SMALL, dtype=torch.bfloat16))
    far = num_slots - world.num_pages
    assert far * slot_bytes // 2 > 1 << 31
    near, shape = world.cache(), LayerShape(world.case.kv_heads, world.case.dim, torch.bfloat16, CPU)
    buffer = torch.empty(num_slots * slot_bytes, dtype=torch.uint8)
    cache = PageCache.within(buffer, shape, world.case.page_size, num_slots, 0, slot_bytes)
    cache.data[:, far:] = near.data
    want = run(select_attention(CPU, name), world, near)
    world.pages = [[far + page for page in held] for held in world.pages]
    assert torch.equal(run(select_attention(CPU, name), world, cache), want)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_slot_holds_all_of_a_page(fp8: bool) -> None:
    """A body gives the same bits over slots that were copied elsewhere."""
    world = World(replace(SMALL, slots=True, fp8=fp8))
    cache, body = world.cache(), select_attention(CPU, "cpu")
    want = run(body, world, cache)
    cache, moved = world.cache(), world.pages[0][:1] + world.pages[2][:1]
    free = [page for page in range(world.num_pages) if all(page not in held for held in world.pages)]
    slots = world.buffer.view(world.num_pages, -1)
    slots[free[:2]] = slots[moved]
    slots[moved] = 255  # NaN in every type
    world.pages = [[dict(zip(moved, free, strict=False)).get(page, page) for page in held] for held in world.pages]
    assert torch.equal(run(body, world, cache), want)


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_single_page_has_the_caches_strides(slots: bool, fp8: bool) -> None:
    """What is compiled for it serves the whole cache, which it does not touch."""
    cache = World(replace(SMALL, slots=slots, fp8=fp8)).cache()
    single = cache.single()
    assert single.num_pages == 1
    if single.exponents is not None and cache.exponents is not None:
        assert single.exponents[0].stride() == cache.exponents[0].stride()
    assert single.k.stride() == cache.k.stride()
    assert single.data.untyped_storage().data_ptr() != cache.data.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("slots", [False, True])
def test_touches_only_its_slots(name: str, slots: bool) -> None:
    """Every slot but the step's own is bit-identical before and after, and those hold k and v."""
    world = World(replace(SMALL, slots=slots))
    cache = world.cache(poison=123.0)
    before, batch = cache.data.clone(), world.batch()
    run(select_attention(CPU, name), world, cache)
    page, offset = batch.slots // batch.page_size, batch.slots % batch.page_size
    assert torch.equal(cache.k[page, offset], world.k)
    assert torch.equal(cache.v[page, offset], world.v)
    cache.data[:, page, offset] = before[:, page, offset]
    assert torch.equal(cache.data, before)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_chunked_prefill_is_one_prefill(name: str, chunk: int) -> None:
    """A prompt in one go, in chunks, and token by token: the same outputs."""
    length = 21
    whole = World(Case(lens=((length, length),), page_size=8, window=13, group=3))
    body = select_attention(CPU, name)
    want = run(body, whole)
    cache, parts = whole.cache(), []
    for start in range(0, length, chunk):
        stop = min(length, start + chunk)
        batch = AttentionBatch.build([stop - start], [stop], whole.pages, 8, CPU)
        rows = slice(start, stop)
        parts.append(body(whole.q[rows], whole.k[rows], whole.v[rows], cache, batch, whole.options))
    torch.testing.assert_close(torch.cat(parts), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", BODIES)
def test_sequences_may_share_pages(name: str) -> None:
    """A shared prefix: two sequences whose first page is the same one see the same keys there."""
    world = World(Case(lens=((1, 17), (1, 17)), page_size=8))
    cache = world.cache()
    first, second = world.pages
    cache.data[:, second[0]] = float("nan")
    cache.data[:, second[1]] = cache.data[:, first[1]]
    batch = AttentionBatch.build([1, 1], [17, 17], [first, [first[0], *second[1:]]], 8, CPU)
    q, k, v = (x[:1].expand(2, -1, -1) for x in (world.q, world.k, world.v))
    got = select_attention(CPU, name)(q, k, v, cache, batch, world.options)
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[0].double(), world.expected()[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BODIES)
def test_layers_of_one_step_share_the_batch(name: str) -> None:
    """Layers with different windows and contents run on one batch, as gemma and gpt_oss do."""
    world = World(SMALL)
    batch, body = world.batch(), select_attention(CPU, name)
    for window in (None, 4, None, 9, 4):
        layer = World(replace(SMALL, window=window, seed=window or 0))
        layer.pages = world.pages
        got = body(layer.q, layer.k, layer.v, layer.cache(), batch, layer.options)
        torch.testing.assert_close(got.double(), layer.expected(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", BODIES)
def test_refuses_what_does_not_fit(name: str) -> None:
    world = World(SMALL)
    body, batch, cache = select_attention(CPU, name), world.batch(), world.cache()
    q, k, v = world.q, world.k, world.v
    with pytest.raises(ValueError, match=r"q is \[15"):
        body(q[:-1], k, v, cache, batch, world.options)
    with pytest.raises(ValueError, match=r"v is \[16, 1"):
        body(q, k, v[:, :1], cache, batch, world.options)
    with pytest.raises(ValueError, match="bfloat16"):
        body(q, k.bfloat16(), v, cache, batch, world.options)
    with pytest.raises(ValueError, match="page_size is 16"):
        body(q, k, v, cache, replace(batch, page_size=16), world.options)
    with pytest.raises(ValueError, match=r"sinks is \[1\]: allowed is \[4\]"):
        body(q, k, v, cache, batch, replace(world.options, sinks=torch.zeros(1)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("case", NAMED)
def test_body_is_dense_attention_on_cuda(name: str, case: Case) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    check(name, case, torch.device("cuda"))


@pytest.mark.gpu
@settings(LOOSE, max_examples=200)
@given(cases(700, 12, [8, 64, 80, 128, 256], [torch.float32, torch.bfloat16, torch.float16]))
def test_triton_is_dense_attention_on_cuda(case: Case) -> None:
    check("triton", case, torch.device("cuda"))
