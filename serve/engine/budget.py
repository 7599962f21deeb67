"""Who has how much of the device's buffer: the border between adapters and KV pages, and when it moves.

Adapters lie below the border, pages above it; it moves in whole slots, between two steps. Either side is asked for room
by the other one: by an adapter that a request waits for and that finds none, and by a sequence that would be preempted
or not be admitted for want of pages. What is given, cheapest first:

- to adapters: pages that hold nothing; then (once no unreferenced adapter is left to evict) pages that only the prefix
  cache knows. Pages that are held move out of the way, a bounded number of them at a time.
- to pages: the arena's free room, compacted; then what unreferenced adapters hold that nobody waits for. Compaction is
  bounded in each step: meanwhile the sequence sits out, and nobody is preempted.

Why it does not oscillate: room is taken only from a side that has not been short itself for ``CALM`` steps. Where both
are short the split stands, sequences are preempted and adapters are served in turns, each within its own part. A move
is at least ``1 / SHARES`` of the budget, or all that was asked for, so that a side that grows does not ask each time.
Nobody starves in that: pages never go below what the longest sequence needs, and adapters that the oldest waiting
request needs together get their room whoever else is short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from onebase.adapters.tiers.cache import AdapterCache
from onebase.serve.engine.memory import MemoryPlan
from onebase.serve.engine.scheduler import Room, Scheduler
from onebase.serve.engine.waiting import WaitingRoom

PATIENCE = 64  # steps in which nobody is preempted for pages, because blocks are moving out of their way
CALM = 32  # steps without a shortage after which a side gives: longer than a burst of short requests takes to pass
SHARES = 32  # of the budget; one of them is the least that moves without need
MOVED_BYTES = 16 << 20  # of held pages, copied between two steps: some 10 ms of a host's memory, less of a GPU's
_LONG_AGO = -CALM


class DeviceBudget:
    """Moves the border. The arena's neighbour, and what the scheduler asks for pages. Used by the engine's thread.

    copy_pages: copies them on the device, old -> new. moves: of the border, so far.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        scheduler: Scheduler,
        adapters: AdapterCache,
        copy_pages: Callable[[dict[int, int]], None],
        waiting: WaitingRoom,
    ) -> None:
        self.moves = 0
        self._plan = plan
        self._scheduler = scheduler
        self._pages = scheduler.pages
        self._adapters = adapters
        self._arena = adapters.arena
        self._copy_pages = copy_pages
        self._waiting = waiting
        self._step = 0
        self._adapters_short = self._pages_short = _LONG_AGO  # the latest step in which they were
        self._coming_since = self._coming = _LONG_AGO  # the steps in which pages were said to come, without a gap
        self._most_moved = max(1, MOVED_BYTES // plan.slot_bytes)
        self._share = max(1, plan.num_slots // SHARES)
        scheduler.more_pages, adapters.device.neighbour = self.more_pages, self

    def step(self) -> None:
        """The engine's next step begins."""
        self._step += 1

    # Pages give to adapters

    @property
    def spare_bytes(self) -> int:
        """What the pages could give to the arena now."""
        return self._spare(self._pages.num_free) * self._plan.slot_bytes

    def give(self, nbytes: int, *, cached: bool) -> bool:
        """Make the arena longer by so many bytes. cached: at the cost of idle pages, too; whoever asks so is short."""
        if cached:
            self._adapters_short = self._step
        wanted = -(-nbytes // self._plan.slot_bytes)
        spare = self._spare(self._pages.num_free if cached else self._pages.num_unused)
        if spare < min(wanted, self._share) and not self._must_give:
            return False
        count = min(max(wanted, self._share), spare)
        return count > 0 and self._withdraw(count)

    @property
    def _must_give(self) -> bool:
        return self._waiting.needed_bytes > self._arena.capacity_bytes

    def _spare(self, free: int) -> int:
        """Slots of ``free`` ones that may go. Running sequences keep a page each: they will need it soon."""
        if self._is_short(self._pages_short) and not self._must_give:
            return 0
        kept = free - len(self._scheduler.running)
        bound = self._pages.num_pages - self._plan.pages.least
        room = (self._plan.adapters.most - self._arena.capacity_bytes) // self._plan.slot_bytes
        return max(0, min(kept, bound, room))

    def _withdraw(self, count: int) -> bool:
        before = self._pages.first
        moved = self._scheduler.withdraw(count, self._most_moved)
        if moved:
            self._copy_pages(moved)
        self._move_border()
        return self._pages.first > before

    # Adapters give to pages

    def more_pages(self, count: int) -> Room:
        """Make so many more pages free. Nothing is changed but the arena's order where there is no room."""
        self._pages_short = self._step
        count = max(count, 1)
        room = self._plan.pages.most - self._pages.num_pages
        room = min(room, self._pages.first - -(-self._plan.adapters.least // self._plan.slot_bytes))
        if count > room or self._is_short(self._adapters_short):
            return Room.NONE
        awaited = self._waiting.wanted | self._waiting.kept
        for free in (self._arena.free_bytes, self._adapters.device.spare_bytes(awaited)):
            slots = min(max(count, self._share), room, self._slots(free))
            if slots >= count:
                return Room.NOW if self._extend(slots, awaited, count) else self._wait()
        return Room.NONE

    def _wait(self) -> Room:
        """Bytes enough are free, but not yet next to the pages."""
        if self._step > self._coming + 1:
            self._coming_since = self._step
        self._coming = self._step
        return Room.SOON if self._step - self._coming_since < PATIENCE else Room.NONE

    def _extend(self, slots: int, awaited: Collection[str], count: int) -> bool:
        """Take so many slots of the arena's end, once what lies there has gone or moved: at least ``count``."""
        tail = self._adapters.device.give_room(self._bytes_of(slots), awaited)
        slots = min(slots, self._slots(tail))
        if slots < count:
            return False
        self._pages.add(slots)
        self._move_border()
        self._coming = _LONG_AGO
        return True

    def _slots(self, nbytes: int) -> int:
        """Slots that the arena gives with so many bytes of its end; its last slot may not be whole."""
        return max(0, self._pages.first - -(-(self._arena.capacity_bytes - nbytes) // self._plan.slot_bytes))

    def _bytes_of(self, slots: int) -> int:
        """What the arena loses with its last slots."""
        return self._arena.capacity_bytes - self._plan.arena_bytes(self._pages.first - slots)

    # Both

    def _is_short(self, latest: int) -> bool:
        return self._step - latest < CALM

    def _move_border(self) -> None:
        """The arena ends where the pages begin."""
        self._arena.resize(self._plan.arena_bytes(self._pages.first) // self._arena.buffer.element_size())
        self.moves += 1

    def check(self) -> None:
        """Prove that the arena and the pages tile the budget, within its bounds. Raises RuntimeError where not."""
        pages, plan, capacity = self._pages, self._plan, self._arena.capacity_bytes
        if pages.first + pages.num_pages != plan.num_slots:
            raise RuntimeError(f"budget: {pages.first} slots of adapters + {pages.num_pages} pages of {plan.num_slots}")
        gap = plan.arena_bytes(pages.first) - capacity
        if not 0 <= gap < self._arena.block_bytes(1):
            raise RuntimeError(f"budget: the arena has {capacity} bytes, the slots before the pages {gap} more")
        if not plan.pages.least <= pages.num_pages <= plan.pages.most:
            raise RuntimeError(f"budget: {pages.num_pages} pages; allowed is {plan.pages.least} to {plan.pages.most}")
        if not plan.adapters.least - self._arena.block_bytes(1) < capacity <= plan.adapters.most:
            raise RuntimeError(f"budget: the arena has {capacity} bytes, out of {plan.adapters}")
