"""Libraries' attention beside the Triton body: right over mixed steps, chosen where it is faster, and never trusted.

The libraries' own functions need a GPU; here stand-ins with their signatures read what they would read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from onebase.kernels import attention_choice
from onebase.kernels.attention import AttentionOptions, PageCache
from onebase.kernels.attention_choice import MeasuredAttention
from onebase.kernels.attention_libraries import FlashInfer, Library, VarlenPrompts
from onebase.kernels.attention_reference import attend
from onebase.kernels.attention_triton import TritonAttention

from .test_attention import CPU, TOLERANCE, Case, World, needs_interpreter, run

MIXED = ((1, 20), (9, 9), (3, 17), (1, 1), (14, 14), (1, 5))  # decoding, whole prompts, a later chunk, one token
CASES = [
    Case(MIXED, dtype=torch.bfloat16, page_size=8),
    Case(MIXED, dtype=torch.float16, window=6, seed=1),
    Case(((5, 5), (7, 7)), dtype=torch.bfloat16, kv_heads=1, group=4, seed=2),
    Case(((1, 9), (1, 30)), dtype=torch.bfloat16, seed=3),
]


def varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As torch.nn.attention.varlen.varlen_attn documents itself."""
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert window_size[1] == 0, "causal"
    options = AttentionOptions(scale, None if window_size[0] < 0 else window_size[0] + 1)
    spans = list(zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True))
    assert max(stop - start for start, stop in spans) == max_q == max_k
    assert torch.equal(starts_q, starts_k)
    return torch.cat([attend(q[a:b], k[a:b], v[a:b], options) for a, b in spans])


def older_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """That of torch 2.11: a head of K and V for each of Q."""
    return varlen(q, k, v, starts_q, starts_k, max_q, max_k, scale=scale, window_size=window_size)


class Wrapper:
    """As flashinfer's BatchPrefillWithPagedKVCacheWrapper documents itself."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(self, starts: Tensor, ends: Tensor, pages: Tensor, last: Tensor, *shape: int, **options: Any) -> None:
        self.starts, self.ends, self.pages, self.last, self.page_size = starts, ends, pages, last, shape[3]
        window, cap = options["window_left"], options["logits_soft_cap"]
        assert options["causal"]
        self.options = AttentionOptions(options["sm_scale"], None if window < 0 else window + 1, cap)

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        rows = []
        for at, last in enumerate(self.last.tolist()):
            pages = self.pages[int(self.ends[at]) : int(self.ends[at + 1])].long()
            length = (len(pages) - 1) * self.page_size + last
            keys, values = (half[pages].flatten(0, 1)[:length] for half in kv)
            rows.append(attend(q[int(self.starts[at]) : int(self.starts[at + 1])], keys, values, self.options))
        return torch.cat(rows)


def libraries() -> dict[str, Library]:
    varlens = {"varlen": VarlenPrompts(varlen), "older varlen": VarlenPrompts(older_varlen)}
    return {**varlens, "flashinfer": FlashInfer(CPU, Wrapper)}


def measured(
    *libraries: Library, clock: Callable[[Callable[[], Tensor]], float] = lambda run: 1.0
) -> MeasuredAttention:
    return MeasuredAttention(TritonAttention.on(CPU), libraries, clock, {})


@needs_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["varlen", "older varlen", "flashinfer"])
def test_a_library_and_the_triton_body_share_a_step(name: str, case: Case) -> None:
    world, library, body = World(case), libraries()[name], measured()
    got = run(lambda *args: body._by(library, *args), world)  # type: ignore[arg-type]
    want = world.expected()
    assert (got.double() - want).abs().max() <= TOLERANCE[case.dtype] * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("case", [Case(MIXED), Case(MIXED, dtype=torch.bfloat16, sinks=True)], ids=str)
def test_libraries_leave_what_they_lack(case: Case) -> None:
    world = World(case)
    for library in libraries().values():
        assert library.sequences(world.batch(), world.cache(), world.options) == ()


def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_PROMPTS", (5, 9)), ("_DECODING", (1, 1)), ("_DECODING_KEYS", 6)):
        monkeypatch.setattr(attention_choice, name, value)


def cache_of(case: Case) -> tuple[PageCache, AttentionOptions]:
    world = World(case)
    return world.cache(), world.options


class Turns:
    """A clock: the Triton body takes one second, what is timed after it ``factor`` times as long."""

    def __init__(self, factor: float) -> None:
        self.factor, self.timed = factor, 0

    def __call__(self, run: Callable[[], Tensor]) -> float:
        run()
        self.timed += 1
        return 1.0 if self.timed % 2 else self.factor


@needs_interpreter
@pytest.mark.parametrize(("factor", "count"), [(0.5, 2), (2.0, 0)])
def test_the_faster_one_is_chosen_for_prompts_and_for_decoding(
    factor: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_trials(monkeypatch)
    body = measured(libraries()["flashinfer"], clock=Turns(factor))
    cache, options = cache_of(CASES[0])
    body.warm_up(4, cache, options)
    assert len(body.chosen) == count
    world = World(CASES[0])
    want = world.expected()
    assert (run(body, world).double() - want).abs().max() <= TOLERANCE[torch.bfloat16] * max(
        1.0, float(want.abs().max())
    )


@needs_interpreter
def test_a_library_that_raises_or_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_trials(monkeypatch)

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    wrong = VarlenPrompts(lambda *args, **kwargs: 1.1 * varlen(*args, **kwargs))
    caplog.set_level("INFO")
    body = measured(VarlenPrompts(broken), wrong, clock=lambda run: 0.0 if run() is None else 1.0)
    cache, options = cache_of(CASES[0])
    body.warm_up(4, cache, options)
    assert body.chosen == {}
    assert "no kernel image" in caplog.text
    assert "differs from the Triton body" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_libraries_that_are_installed_equal_the_oracle(case: Case) -> None:
    device = torch.device("cuda")
    body = MeasuredAttention.on(device)
    world = World(case, device)
    want = world.expected()
    for library in body.libraries:
        try:
            got = run(lambda *args, library=library: body._by(library, *args), world)  # type: ignore[arg-type, misc]
        except RuntimeError as error:
            pytest.skip(f"{library.name} does not run here: {error}")
        assert (got.double() - want).abs().max() <= TOLERANCE[case.dtype] * max(1.0, float(want.abs().max()))


@pytest.mark.gpu
def test_cuda_chooses_without_failing() -> None:
    device = torch.device("cuda")
    body = MeasuredAttention.on(device)
    case = Case(((1, 1),), page_size=16, kv_heads=8, group=4, dim=128, dtype=torch.bfloat16)
    world = World(case, device)
    body.warm_up(32, world.cache(), world.options)
    assert torch.isfinite(run(body, world).float()).all()
