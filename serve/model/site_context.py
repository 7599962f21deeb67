"""What the wrappers of sites share: the plans of the present step, and what they leave for one another."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from onebase.kernels.base import LowRankKernels
from onebase.kernels.instructions import InstructionTable, Placed
from onebase.kernels.plan import BatchPlan
from onebase.kernels.tables import ProgramTables
from onebase.kernels.touched import NOWHERE, Touched
from onebase.serve.model.sums import Sums


@dataclass(slots=True, eq=False)
class StepPlans:
    """The plans of the present step. None where the whole batch is base: sites then return at once.

    rows: over the packed tokens; logits: over the rows that reach the output head. tokens: [T] int64, the packed ids;
    virtual ones are negative here, and 0 where the model reads them.
    """

    rows: BatchPlan | None = None
    logits: BatchPlan | None = None
    tokens: Tensor | None = None


@dataclass(slots=True, eq=False)
class SiteContext:
    """What every wrapper reads. residuals: path of a block -> what its norm read in this forward, [1, T, width].
    beside: path of an attention module -> rows and what is added to its output there. touched: sites with instructions
    in the plan ``of``, the latest that was asked about; acted: what kernels do in the plan ``acting``. sums: the
    model's."""

    kernels: LowRankKernels
    tables: ProgramTables
    instructions: InstructionTable
    plans: StepPlans
    sums: Sums = field(default_factory=Sums)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, list[tuple[slice, Tensor]]] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    of: BatchPlan | None = None
    acted: Touched = NOWHERE
    acting: BatchPlan | None = None

    def acts(self, plan: BatchPlan) -> Touched:
        """Where the kernels have something to do."""
        if plan is not self.acting:
            self.acting, self.acted = plan, self.tables.touched(plan)
        return self.acted

    def touches(self, path: str) -> bool:
        """Whether the step's packed rows have instructions at a site: all that most sites of most steps ask."""
        plan = self.plans.rows
        if plan is not self.of:
            self.of, self.touched = plan, frozenset() if plan is None else self.instructions.touched(plan)
        return path in self.touched

    def forget(self) -> None:
        """What a forward that raised has left for its later modules."""
        self.residuals.clear()
        self.beside.clear()

    def placed(self, path: str) -> tuple[Placed, ...]:
        """The instructions of the step's packed rows at a site."""
        plan = self.plans.rows
        return self.instructions.placed(path, plan) if plan is not None and self.touches(path) else ()
