"""`results/index.html`: all tables and figures of all sweeps in one file that needs no other."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path

from massdpo import store
from massdpo.report.tables import Table, to_html

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1,h2,h3{line-height:1.2}h2{border-top:2px solid #1a1a1a;padding-top:1rem;margin-top:3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th{text-align:left;border-top:2px solid;border-bottom:1px solid}td,th{padding:.2rem .6rem;white-space:nowrap}
tr.block td{border-top:1px solid #999}tbody{border-bottom:2px solid}.missing{color:#a33}
.note{color:#555;font-size:.85rem;margin:.3rem 0}img{max-width:100%;height:auto}nav a{margin-right:1rem}
"""


@dataclass
class Section:
    """What one sweep has to show."""

    sweep: str
    title: str
    source: str  # where the numbers come from: command, commit, machine
    tables: list[Table]
    figures: list[Path]


def write_page(path: Path, sections: list[Section]) -> None:
    links = "".join(f'<a href="#{html.escape(part.sweep)}">{html.escape(part.title)}</a>' for part in sections)
    body = "".join(_section(part) for part in sections)
    store.write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>massdpo: results</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>massdpo: results</h1><nav>{links}</nav>\n{body}</body></html>\n",
    )


def _section(part: Section) -> str:
    figures = "".join(
        f'<p><img alt="{html.escape(figure.stem)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(figure.with_suffix(".svg").read_bytes()).decode()}"></p>\n'
        for figure in part.figures
    )
    tables = "".join(to_html(table) for table in part.tables)
    head = f'<h2 id="{html.escape(part.sweep)}">{html.escape(part.title)}</h2>'
    return f"{head}<p class=note>{html.escape(part.source)}</p>\n{figures}{tables}"
