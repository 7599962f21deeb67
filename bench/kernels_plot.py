"""A picture of the kernel benchmark: bandwidth of every side over the bytes that a case cannot do without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onebase.bench.kernels_sides import GATHER, GROUPED, LOOP, OURS

_STYLES = {OURS: ("o", "#1b6ca8"), LOOP: ("x", "#c44536"), GATHER: ("^", "#d99a2b"), GROUPED: ("s", "#6b8e4e")}


def draw(results: Sequence[dict[str, Any]], bandwidth: float, path: Path) -> None:
    """One panel per hidden size. Needs matplotlib (the extra `plot`)."""
    from matplotlib.figure import Figure

    hidden = sorted({result["hidden"] for result in results})
    figure = Figure(figsize=(5 * len(hidden), 4.5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(hidden), sharey=True, squeeze=False)[0], hidden, strict=True):
        _panel(axes, [result for result in results if result["hidden"] == size], bandwidth)
        axes.set_title(f"hidden {size}")
    figure.axes[0].set_ylabel("GB/s of the bytes that must move")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, results: Sequence[dict[str, Any]], bandwidth: float) -> None:
    for name, (marker, colour) in _STYLES.items():
        known = [(r["floor_bytes"], r["seconds"][name]) for r in results if name in r["seconds"]]
        x, y = [size / 1e6 for size, _ in known], [size / seconds / 1e9 for size, seconds in known]
        axes.scatter(x, y, marker=marker, color=colour, s=24, label=name, alpha=0.8)
    axes.axhline(bandwidth / 1e9, color="#444444", linewidth=1, linestyle="--", label="copy")
    axes.set(xscale="log", yscale="log", xlabel="MB that must move")
    axes.grid(visible=True, alpha=0.3)
