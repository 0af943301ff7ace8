"""`index.html`: the finding, then all tables and figures of all sweeps, in one self-contained file."""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

from massdpo import store
from massdpo.evaluation.metrics import METRICS
from massdpo.report.methods import METHODS
from massdpo.report.tables import ReportTable, to_html

FINDING = "finding.md"  # beside the page, if somebody has written one: a paragraph in Markdown
FOLDED = 30  # lines; longer tables are folded

STYLE = """
*{box-sizing:border-box}body{font:16px/1.55 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:72rem;
margin:1.5rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1,h2,h3{line-height:1.2}h2{border-top:2px solid #1a1a1a;padding-top:1rem;margin-top:3rem}h3{font-size:1rem}
.finding{font-size:1.15rem;border-left:4px solid #D55E00;padding-left:1rem;max-width:50rem}
nav{display:flex;flex-wrap:wrap;gap:.4rem 1.1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th{text-align:left;border-top:2px solid;border-bottom:1px solid}td,th{padding:.2rem .6rem;white-space:nowrap}
td.text{white-space:normal;min-width:14rem}
tr.block td{border-top:1px solid #999}tbody{border-bottom:2px solid}.missing{color:#a33}
.note{color:#555;font-size:.85rem;margin:.3rem 0;max-width:60rem}summary{cursor:pointer;margin:.6rem 0}
figure{margin:1rem 0}figure img{max-width:100%;height:auto}figure .close{display:none}
figure:target{position:fixed;inset:0;margin:0;padding:2.5rem 1rem 1rem;background:#fff;overflow:auto;z-index:1}
figure:target img{max-width:none;width:max(100%,75rem)}
figure:target .close{display:block;position:fixed;top:.3rem;right:1rem;font-size:1.3rem;background:#fff}
"""


@dataclass
class Section:
    """What one sweep has to show."""

    sweep: str
    title: str
    source: str  # where the numbers come from: command, commit, machine
    tables: list[ReportTable]
    figures: list[Path]


def write_page(path: Path, sections: list[Section]) -> None:
    """The page of these sections, in their order, after the finding if there is one."""
    finding = path.with_name(FINDING)
    told = f"<p class=finding>{_inline(finding.read_text(encoding='utf-8'))}</p>" if finding.exists() else ""
    names = [(part.sweep, part.title) for part in sections] + [("methods", "Methods"), ("metrics", "Metrics")]
    links = "".join(f'<a href="#{html.escape(name)}">{html.escape(title)}</a>' for name, title in names)
    body = "".join(_section(part) for part in sections)
    store.write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>massdpo: results</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>massdpo: results</h1>{told}<nav>{links}</nav>\n{body}{_glossary()}</body></html>\n",
    )


def _inline(markdown: str) -> str:
    """A paragraph of Markdown as HTML: bold and code only."""
    text = html.escape(" ".join(markdown.split()))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text))


def _section(part: Section) -> str:
    name = html.escape(part.sweep)
    figures = "".join(_figure(figure, part) for figure in part.figures)
    tables = "".join(
        f"<details{'' if len(table.lines) > FOLDED else ' open'}><summary><b>{html.escape(table.title)}</b>, "
        f"{len(table.lines)} lines</summary>{to_html(table)}</details>"
        for table in part.tables
    )
    source = f"<p class=note>{html.escape(part.source)}</p>"
    source = f"<details><summary>Where these numbers come from</summary>{source}</details>"
    return f'<h2 id="{name}">{html.escape(part.title)}</h2>\n{figures}{tables}{source}\n'


def _figure(figure: Path, part: Section) -> str:
    """A click enlarges it, another one closes it."""
    name, picture = html.escape(figure.stem), base64.b64encode(figure.with_suffix(".svg").read_bytes()).decode()
    return (
        f'<figure id="figure-{name}"><a class=close href="#{html.escape(part.sweep)}">close ✕</a>'
        f'<a href="#figure-{name}"><img alt="{html.escape(part.title)}: {name}" '
        f'src="data:image/svg+xml;base64,{picture}"></a></figure>\n'
    )


def _glossary() -> str:
    methods = "".join(_line(name, method.meaning) for name, method in METHODS.items())
    metrics = "".join(_line(metric.label, metric.meaning) for metric in METRICS.values() if metric.column != "rank_sum")
    return (
        f'<h2 id="methods">Methods</h2><div class=scroll><table><tbody>{methods}</tbody></table></div>'
        f'<h2 id="metrics">Metrics</h2><div class=scroll><table><tbody>{metrics}</tbody></table></div>'
        "<p class=note>(summed): ranked by the summed log-prob of a response instead of the mean per token.</p>"
    )


def _line(name: str, meaning: str) -> str:
    return f"<tr><td>{html.escape(name)}</td><td class=text>{_inline(meaning)}</td></tr>"
