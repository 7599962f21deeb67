"""A view of a load run that shows nothing: where many runs follow each other."""

from __future__ import annotations

from onebase.bench.load.timeline import Row
from onebase.bench.load.worker import Progress


class Quiet:
    """A load.run.View."""

    def update(self, seconds: float, progress: Progress, gauges: Row) -> None:
        """Nothing is shown."""
