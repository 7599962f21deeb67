"""Results of the other benchmarks as a page: every figure with its rounds, those of one kind side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onebase.bench.reports import page
from onebase.bench.reports.chart import Bar, Line, Mark, bar_chart, line_chart
from onebase.bench.reports.figures import Figure, figures
from onebase.bench.reports.stored import Stored

_MOST_BARS = 14


def figures_page(stored: Stored) -> str:
    """The whole document."""
    return page.page(f"{stored.benchmark}: {stored.name}", stored.where, list(figures_sections(stored)))


def figures_sections(stored: Stored) -> Iterable[str]:
    found = figures(stored)
    if stored.benchmark == "sweep":
        yield page.section("Attainment", page.charts(sweep_chart(stored)))
    if refused := stored.data.get("refused"):
        yield page.section("What each refused", refusals_table(refused))
    yield page.section("Figures", page.charts(*_bars(found)), _table(found))
    if settings := list(_settings(stored)):
        yield page.section("What ran", page.table(["setting", "value"], settings, words=True))


_SETTINGS = ("plan", "load", "workload", "case", "shape", "clients", "dtype", "http", "axis")


def _settings(stored: Stored) -> Iterable[list[str]]:
    for key, value in stored.data.items():
        if key in _SETTINGS:
            inner = value.items() if isinstance(value, Mapping) else [("", value)]
            yield from ([f"{key} {name}".strip(), str(one)[:300]] for name, one in inner)


def _bars(found: Sequence[Figure]) -> Iterable[str]:
    """A chart for the figures of one place and one order of size: others would be no more than a dot beside them."""
    for (path, _), group in _grouped(found).items():
        if len(group) > 1:
            bars = [Bar(f.path[-1], f.median, str(f), _spread(f)) for f in group[:_MOST_BARS]]
            yield bar_chart(": ".join(path) or "Figures", bars)


def _grouped(found: Sequence[Figure]) -> dict[tuple[tuple[str, ...], str], list[Figure]]:
    groups = dict[tuple[tuple[str, ...], str], list[Figure]]()
    for figure in found:
        kind = "ratio" if "ratio" in figure.name or " / " in figure.path[-1] else str(figure.better)
        groups.setdefault((figure.path[:-1], kind), []).append(figure)
    return groups


def _spread(figure: Figure) -> tuple[float, float] | None:
    return (min(figure.values), max(figure.values)) if len(figure.values) > 1 else None


def _table(found: Sequence[Figure]) -> str:
    rows = [[f.name, str(f), str(len(f.values)), f.better or "-"] for f in found]
    return page.table(["figure", "median (lowest to highest)", "rounds", "better"], rows)


def sweep_chart(*sweeps: Stored) -> str:
    """Attainment over what was swept; a mark at the highest that held."""
    lines, marks = list[Line](), list[Mark]()
    for stored in sweeps:
        points = stored.data.get("points", ())
        lines.append(Line(stored.name, sorted((p["value"], 100 * p["attainment"]) for p in points)))
        if (highest := stored.data.get("highest")) is not None:
            marks.append(Mark(f"highest that holds: {highest:g}", x=highest))
    target = 100 * sweeps[0].data.get("target", 0.0)
    marks.append(Mark(f"target {target:g} %", y=target))
    axis = str(sweeps[0].data.get("axis", "value"))
    label = {"rate": "requests / s", "adapters": "adapters"}.get(axis, axis)
    return line_chart(
        "Share of requests within the limits", label, "attainment, %", lines, y_range=(0, 105), marks=marks
    )


def refusals_table(refused: Mapping[str, Mapping[str, str]]) -> str:
    """refused: server -> adapter -> why."""
    rows = [[server, adapter, why[:300]] for server, one in refused.items() for adapter, why in one.items()]
    rows += [[server, "-", "nothing"] for server, one in refused.items() if not one]
    return page.table(["server", "adapter", "why"], rows, words=True)
