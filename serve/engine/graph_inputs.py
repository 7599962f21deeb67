"""What a captured decode step reads: buffers whose addresses stay, written anew for every replay.

Rows that a step lacks are of no importance: token 0 at position 0 of a sequence of length 1, whose K and V go to a
scratch page that belongs to nobody.
"""

from __future__ import annotations

import numpy as np
import torch

from onebase.kernels.attention import AttentionBatch
from onebase.kernels.fixed_plan import FixedPlan
from onebase.kernels.plan import BatchPlan
from onebase.serve.engine.inputs import StepInputs


class StaticInputs:
    """``inputs`` is what is captured over; ``fill`` says what it means from then on.

    rows: of the step; max_pages: of a sequence; longest: tokens of a sequence, from which attention takes its shape;
    scratch: a page that nobody holds. fixed: the adapters' plan, None for a step of base rows.
    """

    def __init__(
        self,
        rows: int,
        max_pages: int,
        page_size: int,
        longest: int,
        scratch: int,
        device: torch.device,
        fixed: FixedPlan | None,
    ) -> None:
        self._used, self._scratch, self._fixed = 0, scratch, fixed
        self._base_rows = BatchPlan(rows)
        attention = AttentionBatch(
            query_lens=(1,) * rows,
            kv_lens=(longest,) * rows,
            page_size=page_size,
            slots=torch.full((rows,), scratch * page_size, dtype=torch.int64, device=device),
            block_tables=torch.full((rows, max_pages), scratch, dtype=torch.int32, device=device),
            query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
            kv_lens_device=torch.ones(rows, dtype=torch.int32, device=device),
            host_tables=np.zeros((rows, max_pages), dtype=np.int32),
            is_fixed=True,
        )
        plan = None if fixed is None else fixed.plan
        zeros = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2)]
        every = torch.arange(rows, device=device)
        self.inputs = StepInputs(zeros[0], None, zeros[1], every, attention, plan, plan)

    @property
    def is_stale(self) -> bool:
        """See FixedPlan.is_stale."""
        return self._fixed is not None and self._fixed.is_stale

    def fill(self, step: StepInputs) -> None:
        """Take over a step of at most as many rows. Copies on the device's queue; no synchronisation.

        Raises DoesNotFit where its adapters need more than was captured; then nothing has changed.
        """
        if self._fixed is not None:
            self._fixed.fill(self._base_rows if step.rows is None else step.rows)
        used = len(step.ids)
        mine, theirs = self.inputs.attention, step.attention
        for target, source in (
            (self.inputs.ids, step.ids),
            (self.inputs.positions, step.positions),
            (mine.slots, theirs.slots),
            (mine.kv_lens_device, theirs.kv_lens_device),
        ):
            target[:used].copy_(source)
        mine.block_tables[:used, : theirs.block_tables.shape[1]].copy_(theirs.block_tables)
        self._pad(used)

    def _pad(self, used: int) -> None:
        """Rows that the last step had and this one has not become rows of no importance."""
        left, mine = slice(used, self._used), self.inputs.attention
        if used < self._used:
            self.inputs.ids[left].fill_(0)
            self.inputs.positions[left].fill_(0)
            mine.slots[left].fill_(self._scratch * mine.page_size)
            mine.kv_lens_device[left].fill_(1)
            mine.block_tables[left, 0].fill_(self._scratch)
        self._used = used
