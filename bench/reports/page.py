"""The page around charts and tables: one HTML file that needs nothing else, in light or dark as its reader has it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root{--back:#fff;--text:#1c2330;--faint:#5b6472;--rule:#dfe3ea;--grid:#e9ecf1;--card:#f6f8fb;--heat:#1857b8;--bad:#b3261e;
--good:#16723d;--c0:#1857b8;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce;--c4:#0e7490;--c5:#a16207;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--back:#12161d;--text:#e4e8ef;--faint:#9aa4b4;--rule:#2e3642;--grid:#252c37;
--card:#1a2029;--heat:#6aa5ff;--bad:#ff8a80;--good:#6fd89a;--c0:#6aa5ff;--c1:#ff9d5c;--c2:#5fd38a;--c3:#c79bff;--c4:#55cbe0;
--c5:#e3c05a}}
body{margin:0 auto;max-width:1360px;padding:24px;background:var(--back);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:24px;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 10px;border-bottom:1px solid var(--rule);padding-bottom:4px}
p{max-width:78ch}.faint,.none{color:var(--faint)}.warn{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:18px 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:10px 14px}
.card b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.card span{color:var(--faint);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr));gap:18px;margin-bottom:18px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px}
figure.wide{grid-column:1/-1}figcaption{font-weight:600;margin-bottom:6px}svg{width:100%;height:auto;display:block}
svg text{font-size:12px;fill:var(--text)}svg .label{fill:var(--faint)}svg .mark{fill:var(--bad)}
.grid{stroke:var(--grid);fill:none}.axis{stroke:var(--faint);fill:none}.line{fill:none;stroke-width:1.8}
.marked{stroke:var(--bad);stroke-dasharray:4 3;fill:none}.whisker{stroke:var(--text);fill:none;stroke-width:1.2}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:4px 14px 4px 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top;
overflow-wrap:break-word}td.name{min-width:9em;max-width:70ch}
th{color:var(--faint);font-weight:600}td.number,th.number{text-align:right;white-space:nowrap}
td.better{color:var(--good)}td.worse{color:var(--bad)}
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A whole document. title, subtitle: text; sections: HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="faint">{escape(subtitle)}</p>{"".join(sections)}</body></html>\n'
    )


def cards(pairs: Sequence[tuple[str, str]]) -> str:
    """(what, figure) each."""
    inner = "".join(
        f'<div class="card"><span>{escape(what)}</span><b>{escape(figure)}</b></div>' for what, figure in pairs
    )
    return f'<div class="cards">{inner}</div>'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def charts(*figures: str) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def note(text: str, kind: str = "faint") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), *, words: bool = False
) -> str:
    """The first column is text, the others figures, or with ``words`` text too. classes: of each row's last cell."""
    kinds = ["name", *["name" if words else "number"] * (len(columns) - 1)]
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, columns, strict=True))
    body = "".join(_row(row, kinds, classes[place] if classes else "") for place, row in enumerate(rows))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(cells: Sequence[str], kinds: Sequence[str], last: str) -> str:
    names = [*kinds[:-1], f"name {last}" if last else kinds[-1]]
    shown = [f'<td class="{name}">{escape(cell)}</td>' for name, cell in zip(names, cells, strict=True)]
    return f"<tr>{''.join(shown)}</tr>"
