"""`onebase bench report`, `compare`, `docs` and `smoke`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Result = Annotated[Path, typer.Argument(help="A stored result.", exists=True, dir_okay=False)]


def report(
    files: Annotated[list[Path], typer.Argument(help="Stored results, of any benchmark.", exists=True, dir_okay=False)],
) -> None:
    """A page (HTML, needs nothing else) and a summary (Markdown) beside each stored result."""
    from onebase.bench.reports.stored import NotStored
    from onebase.bench.reports.write import write_report

    for file in files:
        try:
            html, text = write_report(file)
        except NotStored as error:
            raise typer.BadParameter(str(error), param_hint="FILES") from None
        print(f"{html}\n{text}")


def compare(
    first: Result,
    second: Result,
    out: Annotated[Path, typer.Option(help="The page; the same in Markdown beside it.")] = Path("compare.html"),
) -> None:
    """What differs between two results of one benchmark beyond noise, second beside first."""
    from onebase.bench.report import print_table
    from onebase.bench.reports import compare as compared
    from onebase.bench.reports import markdown
    from onebase.bench.reports.compare_page import COLUMNS, cells, comparison_page, headline
    from onebase.bench.reports.stored import NotStored, read

    try:
        found = compared.compare(read(first), read(second))
        document = comparison_page(found)
    except NotStored as error:
        raise typer.BadParameter(str(error)) from None
    print_table(headline(found), COLUMNS, [cells(row) for row in found.rows])
    print(*found.notes, sep="\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document)
    out.with_suffix(".md").write_text(markdown.comparison(found))
    print(out)


def docs(
    results: Annotated[Path, typer.Option(help="Stored results.", exists=True, file_okay=False)] = Path(
        "bench/results"
    ),
    out: Annotated[Path, typer.Option(help="The document.")] = Path("docs/benchmarks.md"),
) -> None:
    """docs/benchmarks.md, from the stored results."""
    from onebase.bench.reports.docs import document
    from onebase.bench.reports.stored import NotStored

    try:
        out.write_text(document(results))
    except NotStored as error:
        raise typer.BadParameter(str(error), param_hint="--results") from None
    print(out)


def smoke(
    out: Annotated[Path, typer.Option(help="The figures; a report beside them.")] = Path("build/bench-smoke.json"),
    seconds: Annotated[float, typer.Option(help="Of the load.", min=1)] = 45.0,
    repeats: Annotated[int, typer.Option(help="Of the decode steps.", min=1)] = 5,
) -> None:
    """Load, step and lifecycle in small: a file that two commits can be compared by."""
    from onebase.bench.reports.write import write_report
    from onebase.bench.smoke import run

    run(out, seconds, repeats)
    print(out, *write_report(out), sep="\n")
