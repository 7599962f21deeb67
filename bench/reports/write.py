"""Files beside a result: NAME.html and NAME.md beside NAME.json."""

from __future__ import annotations

from pathlib import Path

from onebase.bench.load import result as load
from onebase.bench.reports import markdown, page
from onebase.bench.reports.figures_page import figures_page, figures_sections
from onebase.bench.reports.load_page import load_page, load_sections
from onebase.bench.reports.stored import Stored, parts, read


def write_report(path: Path) -> tuple[Path, Path]:
    """Returns the paths of page and summary. Raises stored.NotStored."""
    stored = read(path)
    html, text = path.with_suffix(".html"), path.with_suffix(".md")
    html.write_text(document(stored))
    text.write_text(markdown.summary(stored))
    return html, text


def document(stored: Stored) -> str:
    """The page of any result."""
    if stored.benchmark == load.NAME:
        return load_page(stored.name, stored.load())
    if "parts" not in stored.data:
        return figures_page(stored)
    inner = [text for name, part in parts(stored).items() for text in (f"<h1>{name}</h1>", *_sections(name, part))]
    return page.page(stored.name, stored.where, inner)


def _sections(name: str, part: Stored) -> list[str]:
    return list(load_sections(name, part.load()) if part.benchmark == load.NAME else figures_sections(part))
