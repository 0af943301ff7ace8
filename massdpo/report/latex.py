"""Tables for LaTeX, with the packages booktabs and graphicx."""

import re

from massdpo.report.tables import Cell, ReportTable
from massdpo.report.views import shares

LATEX_COLUMNS = 6  # values side by side that fit a page


def to_latex(table: ReportTable, label: str) -> str:
    """A float per block, at most as wide as the page, with many columns split into stacked tabulars.

    p values are left to the other formats; their stars stay.
    """
    return "\n".join(_float(table, block, label) for block in table.blocks)


def _float(table: ReportTable, lines: list[list[Cell]], label: str) -> str:
    block = [cell.text for cell in lines[0][: table.block_names]]
    which = ", ".join(f"{name} {value}" for name, value in zip(table.head[: table.block_names], block, strict=True))
    caption = _escape_latex(" ".join([f"{table.title}: {which}.", *table.notes]))
    name = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join([label, *block]))
    values = list(range(table.names, len(table.head)))
    names = range(table.block_names, table.names)
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{name}}}",
            "\n\\\\[1ex]\n".join(
                _tabular(table.head, lines, [*names, *share]) for share in shares(values, LATEX_COLUMNS)
            ),
            r"\end{table*}",
            "",
        ]
    )


def _tabular(head: list[str], lines: list[list[Cell]], columns: list[int]) -> str:
    def show(cell: Cell) -> str:
        text = re.sub(r"(?<!\w)-(?=\d)", "$-$", _escape_latex(cell.text)) + ("$^*$" if cell.starred else "")
        return rf"\textbf{{{text}}}" if cell.best else rf"{text}$^\sim$" if cell.tie else text

    return "\n".join(
        [
            # shrunk to the page if wider, but never enlarged
            r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
            r"\toprule",
            " & ".join(_escape_latex(head[column]) for column in columns) + r" \\",
            r"\midrule",
            *(" & ".join(show(line[column]) for column in columns) + r" \\" for line in lines),
            r"\bottomrule",
            r"\end{tabular}}",
        ]
    )


LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$"}
    | {"<": "$<$", ">": "$>$", "↓": r"$\downarrow$", "–": "--", "\n": " "}
    | {"β": r"$\beta$", "·": r"$\cdot$"}
)


def _escape_latex(text: str) -> str:
    return text.translate(LATEX)
