"""Adapters between disk, host and device: served the same from each tier, in turns, pinned, unloaded, replaced."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase.adapters.program import LowRank, SiteOps
from onebase.serve.engine.messages import (
    AdapterGone,
    AdapterReady,
    AdapterUse,
    Failure,
    LoadAdapter,
    Request,
    SamplingParams,
    SetPins,
    UnloadAdapter,
)

from .programs import PROMPT, Programs

SITE = "model.layers.0.self_attn.q_proj"
WIDTH = 64
BLOCK = 4096  # bytes of an adapter of rank 8 at one site, float32
KIB = 1 / (1 << 20)  # in GiB


def _ops(seed: int, rank: int = 8) -> dict[str, SiteOps]:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, WIDTH, generator=draw), torch.randn(rank, WIDTH, generator=draw)
    return {SITE: SiteOps(LowRank(a, b, 0.5))}


class Crowd(Programs):
    """An engine, and adapters a0, a1, ... of one size."""

    def __init__(self, driver: Any, count: int) -> None:
        super().__init__(driver)
        self.names = [f"a{number}" for number in range(count)]
        for number, name in enumerate(self.names):
            self.add(name, _ops(number))
        self.engine = driver.engine
        self.cache = driver.engine.adapters

    def ask(self, *names: str, max_tokens: int = 3) -> str:
        return str(self.driver.submit(PROMPT, *map(self.use, names), max_tokens=max_tokens))

    def say(self, name: str) -> list[int]:
        request = self.ask(name)
        self.driver.run()
        return list(self.driver.outputs[request])

    def wait(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, "it did not happen"
            self.driver.step()
            time.sleep(0.0005)

    def command(self, command: Any) -> Any:
        """Hand an unload to the engine and wait for its answer."""
        self.driver._take(self.engine.unload(command))
        self.wait(lambda: command.id in self.driver.failures)
        return self.driver.failures.pop(command.id)


@pytest.fixture
def crowd_of(make_driver: Callable[..., Any]) -> Callable[..., Crowd]:
    """crowd_of(adapters, room on the device, room in host memory, **options)."""

    def make(count: int, room: int, host: int = 0, **options: Any) -> Crowd:
        sizes = {"adapter_memory": (room * BLOCK + 512) / (1 << 30), "host_cache": host * 4.5 * KIB}
        return Crowd(make_driver("llama", **(sizes | {"max_num_seqs": 32} | options)), count)

    return make


# The same from every tier


def test_an_adapter_says_the_same_from_disk_host_and_device(crowd_of: Callable[..., Crowd], tmp_path: Path) -> None:
    crowd = crowd_of(4, room=1, host=2, compiled_dir=str(tmp_path))
    said = {name: crowd.say(name) for name in crowd.names}
    assert len({tuple(tokens) for tokens in said.values()}) == 4
    assert crowd.compiled == crowd.names
    for name in random.Random(1).choices(crowd.names, k=30):
        assert crowd.say(name) == said[name]
    assert crowd.compiled == crowd.names, "compiled once, read from disk afterwards"
    stats = crowd.engine.stats()
    assert stats.host.hits > 0
    assert stats.disk.hits > 0
    assert (stats.disk.misses, stats.disk.adapters) == (4, 4)
    assert stats.device.evictions > 0
    assert stats.device.hits + stats.device.misses == 34
    assert {"read", "compile", "copy", "wait"} == set(stats.load_seconds)
    assert sum(stats.load_seconds["read"].counts) == stats.disk.hits


def test_forms_serve_the_next_engine(crowd_of: Callable[..., Crowd], tmp_path: Path) -> None:
    first, second = (crowd_of(2, room=2, compiled_dir=str(tmp_path)) for _ in range(2))
    said = [first.say(name) for name in first.names]
    assert [second.say(name) for name in second.names] == said
    assert second.compiled == []


def test_a_damaged_form_is_compiled_again(crowd_of: Callable[..., Crowd], tmp_path: Path) -> None:
    crowd = crowd_of(1, room=1, compiled_dir=str(tmp_path))
    said = crowd.say("a0")
    crowd.command(UnloadAdapter("u", "a0"))
    for file in tmp_path.glob("*/*"):
        file.write_bytes(file.read_bytes()[:-9])
    assert crowd.say("a0") == said
    assert crowd.compiled == ["a0", "a0"]
    assert crowd.engine.stats().compiled_failures == 1


def test_a_folder_that_cannot_be_written_costs_nobody_anything(crowd_of: Callable[..., Crowd], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    crowd = crowd_of(2, room=1, compiled_dir=str(tmp_path / "file"))
    assert crowd.say("a0") != crowd.say("a1")
    assert crowd.engine.stats().compiled_failures > 0
    assert not crowd.driver.failures


def test_an_upload_compiles_once(crowd_of: Callable[..., Crowd], tmp_path: Path) -> None:
    """The form is on the disk before the upload is answered, whether or not the device has room."""
    crowd = crowd_of(2, room=1, compiled_dir=str(tmp_path))
    busy = crowd.ask("a0", max_tokens=100)
    crowd.wait(lambda: bool(crowd.engine.scheduler.running))
    assert crowd.engine.load(LoadAdapter("c", crowd.use("a1"))) == []
    crowd.wait(lambda: "c" in crowd.driver.failures)
    assert isinstance(crowd.driver.failures["c"], AdapterReady)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
    crowd.driver.run()
    crowd.say("a1")
    assert crowd.compiled == ["a0", "a1"]
    assert len(crowd.driver.outputs[busy]) == 100


def test_what_the_device_has_no_room_for_comes_to_host_memory_meanwhile(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(8, room=2, host=8)
    for name in crowd.names:
        crowd.ask(name, max_tokens=60)
    crowd.wait(lambda: len(crowd.cache.host) == 8 and len(crowd.cache.resident()) == 2)
    assert len(crowd.engine.scheduler.running) == 2, "the first two still run"
    crowd.driver.run()
    assert sorted(crowd.compiled) == crowd.names


def test_prefetch_does_not_overflow_host_memory(crowd_of: Callable[..., Crowd]) -> None:
    """More waiting adapters than host memory holds: those of the next turn are fetched, and stay for it."""
    crowd = crowd_of(12, room=2, host=4)
    ids = [crowd.ask(name, max_tokens=4) for name in crowd.names]
    crowd.driver.run()
    assert all(len(crowd.driver.outputs[one]) == 4 for one in ids)
    assert max(Counter(crowd.compiled).values()) <= 2


def test_host_changes_are_what_the_tier_holds(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(6, room=1, host=2)
    held: set[str] = set()
    for name in [*crowd.names, *crowd.names[:3]]:
        crowd.say(name)
        changes = crowd.engine.host_changes()
        if changes is not None:
            held = (held | set(changes.added)) - set(changes.removed)
        assert held == {one for one in crowd.names if one in crowd.cache.host}
    assert crowd.engine.host_changes() is None


# Turns


def test_more_adapters_than_fit_are_served_in_turns(crowd_of: Callable[..., Crowd]) -> None:
    """Sixteen adapters on room for eight, random arrivals: no load is wasted, nobody starves."""
    crowd = crowd_of(16, room=8, host=16, max_num_seqs=8)
    draw, ids = random.Random(3), []
    for _ in range(160):
        ids.append(crowd.ask(draw.choice(crowd.names), max_tokens=draw.randrange(1, 8)))
        for _ in range(draw.randrange(3)):
            crowd.driver.step()
    crowd.driver.run()
    assert all(crowd.driver.outputs[one] for one in ids)
    loads = crowd.engine.stats().adapter_loads
    assert loads <= 110, f"{loads} loads for 160 requests"
    assert sorted(crowd.compiled) == sorted(crowd.names), "evicted ones come back from host memory"


def test_every_load_serves_somebody_before_it_is_evicted(
    crowd_of: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = crowd_of(16, room=3, host=4, max_num_seqs=4)
    served: Counter[str] = Counter()
    acquire, evicted, wasted = crowd.cache.acquire, crowd.cache.device._evicted, []

    def acquired(digest: str) -> Any:
        served[digest] += 1
        return acquire(digest)

    def left(entry: Any) -> None:
        if not served.pop(entry.digest, 0):
            wasted.append(entry.digest)
        evicted(entry)

    monkeypatch.setattr(crowd.cache, "acquire", acquired)
    monkeypatch.setattr(crowd.cache.device, "_evicted", left)
    draw = random.Random(4)
    for _ in range(200):
        crowd.ask(draw.choice(crowd.names), max_tokens=draw.randrange(1, 5))
        crowd.driver.step()
    crowd.driver.run()
    assert wasted == []
    assert crowd.engine.stats().adapter_loads <= 200


def test_the_oldest_come_first(crowd_of: Callable[..., Crowd]) -> None:
    """One request for each adapter: they start in the order in which they came, but for those of one turn."""
    crowd = crowd_of(12, room=3, host=12, max_num_seqs=3)
    ids = [crowd.ask(name, max_tokens=5) for name in crowd.names]
    started: list[str] = []
    while crowd.engine.has_work:
        crowd.driver.step()
        started += [one for one in ids if one in crowd.driver.outputs and one not in started]
        time.sleep(0.0005)
    for place, request in enumerate(ids):
        assert abs(started.index(request) - place) <= 3


def test_a_stream_of_younger_requests_over_a_full_device_starves_nobody(crowd_of: Callable[..., Crowd]) -> None:
    """Every adapter on the device has running references at any time, and new requests for all of them keep coming."""
    crowd = crowd_of(5, room=4, host=5, max_num_seqs=16)
    hot = crowd.names[:4]
    for name in hot * 2:
        crowd.ask(name, max_tokens=20)
    crowd.wait(lambda: len(crowd.engine.scheduler.running) == 8)
    old = crowd.ask("a4", max_tokens=2)
    for turn in range(400):
        crowd.ask(hot[turn % 4], max_tokens=12)
        crowd.driver.step()
        time.sleep(0.0005)
        if len(crowd.driver.outputs.get(old, [])) == 2:
            break
    assert turn < 100
    crowd.driver.run()


# Loads that nobody waits for


def _take_time(crowd: Crowd, seconds: float) -> None:
    compile = crowd.cache.transit.fetcher.compile

    def slowly(path: Path, digest: str) -> Any:
        program = compile(path, digest)
        time.sleep(seconds)
        return program

    crowd.cache.transit.fetcher.compile = slowly


def test_uploads_without_end_keep_no_request_from_its_adapter(crowd_of: Callable[..., Crowd]) -> None:
    """Twelve clients upload one adapter after the other: a cold one that is asked for is read next."""
    crowd = crowd_of(200, room=8, host=200)
    _take_time(crowd, 0.003)
    names = iter(crowd.names[1:])

    def upload_and_step() -> None:
        while len(crowd.engine.commands) < 12:
            name = next(names)
            crowd.driver._take(crowd.engine.load(LoadAdapter(f"upload of {name}", crowd.use(name))))
        crowd.driver.step()
        time.sleep(0.001)

    for _ in range(20):
        upload_and_step()
    assert crowd.cache.num_compiling == 0, "nobody waits for these"
    request = crowd.ask("a0", max_tokens=1)
    crowd.driver.step()
    before = len(crowd.compiled)
    while request not in crowd.driver.outputs:
        upload_and_step()
    assert crowd.compiled.index("a0") <= before + 2, "it is what a reader takes next"


def test_an_upload_that_a_request_waits_for_overtakes_the_others(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(30, room=8, host=30)
    _take_time(crowd, 0.01)
    for name in crowd.names:
        crowd.engine.load(LoadAdapter(f"upload of {name}", crowd.use(name)))
    request = crowd.ask("a29", max_tokens=1)
    crowd.wait(lambda: request in crowd.driver.outputs)
    assert crowd.compiled.index("a29") < 20
    crowd.driver.run()


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(5, "Input/output error"), "StorageFailed"), (MemoryError(), "EngineError")]
)
def test_the_adapter_is_not_blamed_for_what_passes(
    error: Exception, kind: str, crowd_of: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = crowd_of(1, room=1)

    def fail(path: Path, digest: str) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(crowd.cache.transit.fetcher, "compile", fail)
        request = crowd.ask("a0")
        crowd.driver.run()
    assert crowd.driver.failures[request].kind == kind
    assert crowd.say("a0")


def test_who_waits_for_room_is_looked_for_in_host_memory_once(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(8, room=4, host=8, max_num_seqs=8)
    for name in crowd.names:
        crowd.say(name)
    for name in crowd.names[:4]:
        crowd.ask(name, max_tokens=80)
    crowd.wait(lambda: len(crowd.engine.scheduler.running) == 4)
    hits = crowd.engine.stats().host.hits
    for name in crowd.names[4:]:
        crowd.ask(name, max_tokens=2)
    for _ in range(20):
        crowd.driver.step()
    waiting = dict(crowd.cache.transit.moving)
    for _ in range(20):
        crowd.driver.step()
    assert waiting
    assert crowd.cache.transit.moving == waiting, "the same entries: how long they wait is counted from their start"
    assert crowd.engine.stats().host.hits - hits <= 4
    crowd.driver.run()


# Pins


def test_pins_are_loaded_without_a_request_and_stay(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(8, room=4, host=8)
    crowd.engine.set_pins(SetPins((crowd.use("a0"), crowd.use("a1"))))
    crowd.wait(lambda: crowd.cache.is_ready("a0") and crowd.cache.is_ready("a1"))
    for name in [*crowd.names[2:], *crowd.names[2:]]:
        crowd.say(name)
        assert crowd.cache.is_ready("a0")
        assert crowd.cache.is_ready("a1")
    stats = crowd.engine.stats()
    assert (stats.pinned, stats.pinned_bytes, stats.pins_waiting) == (("a0", "a1"), 2 * BLOCK, ())
    crowd.engine.set_pins(SetPins(()))
    for name in crowd.names[2:]:
        crowd.say(name)
    assert not crowd.cache.is_ready("a0")
    assert crowd.engine.stats().pinned == ()


def test_pins_beyond_their_share_wait_and_hold_nobody_up(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(10, room=4, host=0)
    crowd.engine.set_pins(SetPins(tuple(map(crowd.use, crowd.names[:6]))))
    # A fourth may have come before the sizes of the others were known: it goes as soon as somebody wants its room.
    crowd.wait(lambda: len(crowd.engine.stats().pinned) >= 3)
    for name in crowd.names[6:]:
        assert crowd.say(name)
    for _ in range(50):
        crowd.driver.step()
        time.sleep(0.001)
    stats = crowd.engine.stats()
    assert stats.pinned == ("a0", "a1", "a2")
    assert stats.pins_waiting == ("a3", "a4", "a5")
    assert max(Counter(crowd.compiled).values()) == 1, "those without room are not loaded again and again"


def test_pins_get_in_whatever_is_asked_for(crowd_of: Callable[..., Crowd]) -> None:
    """Requests over 34 other adapters wait without end, with room for eight."""
    crowd, draw = crowd_of(36, room=8, host=60, max_num_seqs=16), random.Random(1)

    def overload() -> None:
        while len(crowd.engine.scheduler.waiting) < 60:
            crowd.ask(draw.choice(crowd.names[2:]), max_tokens=draw.randrange(2, 12))

    def pins_are_there() -> bool:
        overload()
        return bool(crowd.engine.stats().pinned == ("a0", "a1"))

    for _ in range(60):
        overload()
        crowd.driver.step()
    crowd.engine.set_pins(SetPins((crowd.use("a0"), crowd.use("a1"))))
    crowd.wait(pins_are_there)  # steps are no measure: threads read the files, and a step may take less than that


def test_a_pin_that_cannot_be_loaded_is_tried_once(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(2, room=2)
    pins = SetPins((AdapterUse("unheard of", "unheard of"), crowd.use("a0")))
    for times in (1, 2):
        crowd.engine.set_pins(pins)
        crowd.wait(lambda: crowd.cache.is_ready("a0"))
        for _ in range(30):
            crowd.driver.step()
            time.sleep(0.001)
        assert crowd.compiled.count("unheard of") == times
    assert crowd.engine.stats().pins_waiting == ("unheard of",)


def test_requests_over_a_pinned_adapter_wait_for_nobodys_turn(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(4, room=3, host=4)
    crowd.engine.set_pins(SetPins((crowd.use("a0"),)))
    crowd.wait(lambda: crowd.cache.is_ready("a0"))
    for name in ("a1", "a2"):
        crowd.ask(name, max_tokens=100)
    crowd.wait(lambda: len(crowd.engine.scheduler.running) == 2)
    blocked = crowd.ask("a3", max_tokens=2)
    crowd.wait(lambda: crowd.cache.blocked)
    pinned = crowd.ask("a0", max_tokens=2)
    for _ in range(5):
        crowd.driver.step()
    assert len(crowd.driver.outputs.get(pinned, [])) == 2
    assert "a0" not in crowd.engine.waiting.planned
    crowd.driver.run()
    assert len(crowd.driver.outputs[blocked]) == 2


def test_who_does_not_fit_beside_the_pins_is_told_so(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(3, room=4)
    crowd.add("big", _ops(99, rank=17))
    crowd.engine.set_pins(SetPins(tuple(map(crowd.use, crowd.names))))
    crowd.wait(lambda: len(crowd.engine.stats().pinned) == 3)
    request = crowd.ask("big")
    crowd.driver.run()
    assert crowd.driver.failures[request].kind == "AdapterTooLarge"
    assert "pinned" in crowd.driver.failures[request].message
    crowd.engine.set_pins(SetPins(()))
    assert crowd.say("big")


# Unloading


def test_gone_is_said_once_the_bytes_are_back(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(1, room=1, host=1)
    running = crowd.ask("a0", max_tokens=20)
    crowd.wait(lambda: bool(crowd.engine.scheduler.running))
    assert crowd.engine.unload(UnloadAdapter("u", "a0")) == []
    while "u" not in crowd.driver.failures:
        assert len(crowd.driver.outputs.get(running, [])) < 20
        crowd.driver.step()
        if len(crowd.driver.outputs[running]) == 20:
            crowd.driver.step()
            break
    assert crowd.driver.failures["u"] == AdapterGone("u", "a0", True, 0)
    assert (crowd.cache.arena.used, crowd.cache.host.used) == (0, 0)
    assert len(crowd.driver.outputs[running]) == 20


def test_what_is_to_leave_serves_until_nobody_holds_it(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(1, room=1)
    running = crowd.ask("a0", max_tokens=100)
    crowd.wait(lambda: bool(crowd.engine.scheduler.running))
    assert crowd.engine.unload(UnloadAdapter("u", "a0")) == []
    late = crowd.ask("a0", max_tokens=3)
    crowd.wait(lambda: len(crowd.driver.outputs.get(late, [])) == 3)
    assert len(crowd.driver.outputs[running]) < 100
    assert "u" not in crowd.driver.failures
    crowd.driver.run()
    assert crowd.driver.failures["u"] == AdapterGone("u", "a0", True, 0)
    assert crowd.cache.arena.used == 0
    assert crowd.compiled == ["a0"]


def test_what_is_to_leave_may_leave_with_who_gives_way_to_its_next_request(crowd_of: Callable[..., Crowd]) -> None:
    """The urgent one could start until its seat was made free: then its adapter has to come back."""
    crowd = crowd_of(2, room=2, max_num_seqs=1)
    first = crowd.ask("a0", max_tokens=20)
    crowd.wait(lambda: len(crowd.driver.outputs.get(first, [])) == 5)
    crowd.engine.adapters.fetch("a1", crowd.use("a1").path)
    crowd.wait(lambda: crowd.cache.is_ready("a1"))
    assert crowd.engine.unload(UnloadAdapter("u", "a0")) == []
    uses = (crowd.use("a1"), crowd.use("a0"))
    urgent = Request("urgent", tuple(PROMPT), SamplingParams(3, 0.0, ignore_eos=True), uses, priority=-1)
    crowd.engine.add(urgent)
    crowd.driver.run()
    assert crowd.engine.scheduler.preemptions == 1
    assert (len(crowd.driver.outputs["urgent"]), len(crowd.driver.outputs[first])) == (3, 20)
    assert crowd.compiled == ["a0", "a1", "a0"]
    assert crowd.driver.failures["u"] == AdapterGone("u", "a0", True, 0)


@pytest.mark.parametrize("copied", [True, False])
def test_nobody_gets_hold_of_what_leaves_by_force(
    copied: bool, crowd_of: Callable[..., Crowd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is ready or still being copied: who asks next has it loaded anew."""
    crowd, gate = crowd_of(1, room=1), threading.Event()
    loader = crowd.cache.transit.loader
    copy = loader._copy
    monkeypatch.setattr(loader, "_copy", lambda *args: gate.wait(20) and copy(*args))
    if copied:
        gate.set()
    lost = crowd.ask("a0", max_tokens=50)
    crowd.wait(lambda: bool(crowd.engine.scheduler.running) if copied else crowd.cache.arena.used > 0)
    crowd.driver._take(crowd.engine.unload(UnloadAdapter("u", "a0", force=True)))
    assert not crowd.cache.is_ready("a0")
    late = crowd.ask("a0")
    crowd.driver.step()
    gate.set()
    crowd.driver.run()
    assert crowd.driver.failures[lost].kind == "AdapterUnloaded"
    assert crowd.driver.failures["u"] == AdapterGone("u", "a0", True, 1)
    assert len(crowd.driver.outputs[late]) == 3
    assert crowd.compiled == ["a0", "a0"]


def test_force_ends_running_and_waiting_requests_and_no_others(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(2, room=2, max_num_seqs=3)
    lost = [crowd.ask("a0", max_tokens=50) for _ in range(2)]
    both = crowd.ask("a1", "a0", max_tokens=50)
    crowd.wait(lambda: len(crowd.engine.scheduler.running) == 3)
    waiting = crowd.ask("a0", max_tokens=50)
    kept = crowd.ask("a1", max_tokens=6)
    gone = crowd.command(UnloadAdapter("u", "a0", force=True))
    assert gone == AdapterGone("u", "a0", True, 4)
    for request in (*lost, both, waiting):
        failure = crowd.driver.failures[request]
        assert isinstance(failure, Failure)
        assert failure.kind == "AdapterUnloaded"
    crowd.driver.run()
    assert len(crowd.driver.outputs[kept]) == 6
    assert not crowd.cache.is_ready("a0")
    assert crowd.say("a0"), "it comes back when it is asked for"


def test_unloading_what_only_host_memory_has(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(2, room=1, host=2)
    crowd.say("a0")
    crowd.say("a1")
    assert crowd.command(UnloadAdapter("u", "a0")).was_resident
    assert "a0" not in crowd.cache.host
    assert not crowd.command(UnloadAdapter("u", "a0")).was_resident
    assert len(crowd.cache.policy) == 1, "nothing is remembered of who is nowhere"


def test_a_load_while_it_leaves_keeps_it(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(1, room=1)
    crowd.ask("a0", max_tokens=30)
    crowd.wait(lambda: bool(crowd.engine.scheduler.running))
    assert crowd.engine.unload(UnloadAdapter("u", "a0")) == []
    crowd.driver._take(crowd.engine.load(LoadAdapter("l", crowd.use("a0"))))
    assert crowd.driver.failures["u"].kind == "AdapterConflict"
    assert isinstance(crowd.driver.failures["l"], AdapterReady)
    crowd.driver.run()
    assert crowd.cache.is_ready("a0")


def test_unloading_while_it_is_read(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(1, room=1, host=1)
    assert crowd.engine.load(LoadAdapter("l", crowd.use("a0"))) == []
    gone = crowd.command(UnloadAdapter("u", "a0"))
    assert gone.was_resident
    assert crowd.driver.failures["l"].kind == "AdapterConflict"
    assert (crowd.cache.arena.used, crowd.cache.host.used) == (0, 0)


# Replacement


def test_a_replaced_adapter_is_not_served_from_the_old_ones_pages(crowd_of: Callable[..., Crowd]) -> None:
    """The same prompt under the old and the new digest, the prefix cache on: no hit crosses."""
    crowd = crowd_of(2, room=2, host=2, page_size=4)
    alone = crowd_of(2, room=2, page_size=4, prefix_caching=False)
    running = crowd.ask("a0", max_tokens=30)
    crowd.wait(lambda: len(crowd.driver.outputs.get(running, [])) > 5)
    cached = crowd.engine.stats().cached_tokens
    assert crowd.say("a1") == alone.say("a1")
    assert crowd.engine.stats().cached_tokens == cached, "nothing of the old digest was found"
    assert crowd.command(UnloadAdapter("u", "a0")).aborted == 0
    assert len(crowd.driver.outputs[running]) == 30, "who started on the old one ends on it"
    assert crowd.say("a0") == alone.say("a0")
    assert crowd.say("a1") == alone.say("a1")
    assert crowd.engine.stats().cached_tokens > cached, "within a digest there are hits"


def test_pages_outlive_their_adapter(crowd_of: Callable[..., Crowd]) -> None:
    crowd = crowd_of(1, room=1, page_size=4)
    said = crowd.say("a0")
    crowd.command(UnloadAdapter("u", "a0"))
    before = crowd.engine.stats().cached_tokens
    assert crowd.say("a0") == said
    assert crowd.engine.stats().cached_tokens > before


def test_stats_before_anything_happened_are_plain(crowd_of: Callable[..., Crowd]) -> None:
    stats = crowd_of(1, room=3).engine.stats()
    assert replace(stats.device, capacity=0) == replace(stats.host, capacity=0) == stats.disk


@pytest.mark.parametrize("asked", [True, False])
def test_room_in_pieces_costs_no_warm_adapter(asked: bool, crowd_of: Callable[..., Crowd]) -> None:
    """Thirty-two of 64 blocks are free, none beside another: thirty of them are put together, over some steps; for a
    request, and for a command while nothing runs."""
    crowd = crowd_of(64, room=64, host=80)
    for name in crowd.names:
        crowd.say(name)
    for entry in sorted(crowd.cache.device.entries, key=lambda one: one.block)[::2]:
        crowd.command(UnloadAdapter(f"u-{entry.digest}", entry.digest))
    crowd.add("big", _ops(99, rank=8 * 30))
    if asked:
        assert crowd.say("big")
    else:
        crowd.driver._take(crowd.engine.load(LoadAdapter("l", crowd.use("big"))))
        crowd.wait(lambda: not (crowd.engine.has_work or crowd.cache.busy))
    stats = crowd.engine.stats()
    assert (stats.device.evictions, len(stats.resident)) == (0, 33)
