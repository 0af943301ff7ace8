"""`python -m massdpo.report SWEEP ...`: collect the rows of sweeps, then render tables, figures and the page."""

import argparse
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from massdpo import store
from massdpo.console import in_any_locale, summary_table
from massdpo.errors import UserError
from massdpo.report import figures, status, tables
from massdpo.report.latex import to_latex
from massdpo.report.methods import rank_in
from massdpo.report.page import Section, write_page
from massdpo.report.reading import OF_RUN, read_histories, read_history
from massdpo.report.rows import DATA, RunRows, collect
from massdpo.report.summary import Summary, at_best, summarise
from massdpo.report.views import VIEWS, View, rows_of, view_of

PRINTED = 60  # lines; a longer table is written but not printed


def main(arguments: list[str] | None = None) -> int:
    in_any_locale()
    parser = argparse.ArgumentParser(prog="python -m massdpo.report", description=__doc__)
    parser.add_argument("sweeps", nargs="*", help="sweeps to report (default: all that have rows or runs)")
    parser.add_argument(
        "--status", action="store_true", help="only list which runs are finished, unfinished or missing"
    )
    parser.add_argument("--render", action="store_true", help="render the existing rows without looking at run folders")
    parser.add_argument(
        "--replace", action="store_true", help="delete rows whose run folders are not here (default: keep them)"
    )
    parser.add_argument("--x", default="", help="the option on the x axis of curves (default: as the sweep suggests)")
    parser.add_argument("--group", default="", help="the option that colours stand for (default: methods)")
    parser.add_argument(
        "--runs", type=Path, default=Path("results/runs"), help="where runs are (default: results/runs)"
    )
    parser.add_argument("--out", type=Path, help="where reports go (default: reports/ beside the runs)")
    options = parser.parse_args(arguments)
    out = options.out or options.runs / "reports"
    try:
        sweeps = options.sweeps or _all_sweeps(options.runs, out)
        folders = [options.runs / sweep for sweep in dict.fromkeys(map(rows_of, sweeps))]
        if options.status:
            for folder in folders:
                lines, sentence = status.sweep_status(folder)
                summary_table(folder.name, lines)
                print(sentence)
            return 0
        if not options.render:
            for folder in folders:
                _collect(folder, out, options.replace)
        sections = {sweep: _report(out / sweep, options.x, options.group) for sweep in sweeps}
        for folder in (path.parent for path in sorted(out.glob("*/means.md"))):
            if folder.name not in sections:
                sections[folder.name] = write_tables(folder)[1]
        write_page(out / "index.html", [sections[sweep] for sweep in sorted(sections, key=partial(rank_in, VIEWS))])
        print(f"page: {out / 'index.html'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _all_sweeps(runs: Path, out: Path) -> list[str]:
    sweeps = {path.parent.parent.name for path in runs.glob("*/*/config.yaml")}
    sweeps |= {path.parent.name for path in out.glob("*/rows.csv")}
    if not sweeps:
        raise UserError(f"no runs in {runs} and no rows in {out}: `make demo` makes some")
    return sorted(sweeps | {name for name, view in VIEWS.items() if view.rows_of in sweeps})


def _report(folder: Path, x: str, group: str) -> Section:
    rows_in = folder.with_name(rows_of(folder.name))
    if not (rows_in / "rows.csv").exists():
        raise UserError(f"there is no sweep {folder.name}: no runs of {rows_in.name}, and no rows in {rows_in}")
    section = render(folder, x, group)
    for table in section.tables:
        if len(table.lines) > PRINTED:
            print(f"{table.title}: {len(table.lines)} lines, in {folder}")
            continue
        names = table.block_names
        for block in table.blocks:
            which = ", ".join(cell.text for cell in block[0][:names])
            lines = [dict(zip(table.head[names:], map(str, line[names:]), strict=True)) for line in block]
            summary_table(f"{table.title}: {which}", lines, whole=table.names - names)
        print("\n".join(table.notes))
    print(f"tables, figures and rows: {folder}")
    return section


def _collect(runs: Path, out: Path, only_these: bool) -> None:
    """Add the rows of one sweep's runs, if any, to the existing ones, in place of those of the same name, and write the
    histories for every view that shows their curves."""
    if not runs.is_dir():
        return
    rows, folder = collect(runs), out / runs.name
    if (folder / "rows.csv").exists():
        before = RunRows.read(folder)
        gone = len(set(before.frame["name"]) - set(rows.frame["name"]))
        if gone and only_these:
            print(
                f"warning: {gone} rows deleted from {folder / 'rows.csv'}: their run folders are not here",
                file=sys.stderr,
            )
        elif gone:
            rows = before.merged(rows)
            print(f"{folder / 'rows.csv'}: {gone} rows kept whose run folders are not here (--replace deletes them)")
    rows.write(folder)
    for name, view in VIEWS.items():
        if view.curves and rows_of(name) == runs.name:
            place = out / name / "histories.csv"
            parts = _histories(runs, rows.only(view.labels, view.datasets), view)
            if place.exists() and not only_these:
                parts.append(read_histories(place))
            if not parts:
                place.unlink(missing_ok=True)
                continue
            histories = pd.concat(parts).drop_duplicates([*OF_RUN, "step"])
            histories = histories.sort_values([*OF_RUN, "step"], kind="stable")
            store.write_text(place, histories.to_csv(index=False, lineterminator="\n"))


def _histories(runs: Path, rows: RunRows, view: View) -> list[pd.DataFrame]:
    """The columns of the view from the history of each finished run."""
    parts = []
    for row in rows.frame[rows.frame["status"] == "finished"].to_dict("records"):
        path = runs / row["name"] / "history.csv"
        if path.exists():  # else the row was kept from an earlier report
            parts.append(read_history(path, view.curves).assign(**{name: row[name] for name in OF_RUN}))
    return parts


def tables_of(rows: RunRows, sweep: str) -> tuple[Summary, dict[str, tables.ReportTable]]:
    """The summary of a sweep, and its tables by the names of their files."""
    view = view_of(sweep)
    title = view.title.format(sweep=sweep)
    summary = summarise(rows, view.metrics)
    found = {
        "means": tables.means_table(summary, title),
        "differences": tables.differences_table(summary, f"{title}: against random"),
    }
    if view.against:
        against = summarise(rows, view.metrics, (view.against,))
        head = f"{title}: against {view.against}"
        found[f"differences_to_{view.against}"] = tables.differences_table(against, head, view.against)
    if view.best_on and view.best_on in rows.frame and rows.axes:
        best_rows, told = at_best(rows, view.best_on)
        best = summarise(best_rows, view.metrics)
        table = tables.means_table(best, f"{title}: each method at its best by {view.best_on}")
        table.notes += told
        found["best_means"] = table
        found["best_differences"] = tables.differences_table(best, f"{table.title}, against random at its best")
    return summary, found


def write_tables(folder: Path) -> tuple[Summary, Section]:
    """Tables of one sweep, from `rows.csv` and `prompts.npz` (its own, or those it shows)."""
    sweep, view = folder.name, view_of(folder.name)
    rows = RunRows.read(folder.with_name(rows_of(sweep))).only(view.labels, view.datasets)
    came_from = source(rows, rows_of(sweep))
    summary, found = tables_of(rows, sweep)
    found = {name: table for name, table in found.items() if table.lines}
    for stale in [*folder.glob("*.md"), *folder.glob("*.tex")]:
        if stale.stem not in found:
            stale.unlink()
    for name, table in found.items():
        store.write_text(folder / f"{name}.md", tables.to_markdown(table) + tables.escape_markdown(came_from) + "\n")
        store.write_text(folder / f"{name}.tex", to_latex(table, f"{sweep}-{name}"))
    store.write_text(folder / "tables.csv", tables.to_csv(summary))
    pictures = sorted((folder / "figures").glob("*.png"))
    return summary, Section(sweep, view.title.format(sweep=sweep), came_from, list(found.values()), pictures)


def render(folder: Path, x: str, group: str) -> Section:
    """Write tables and figures of one sweep from the rows in its folder; returns what the page shows of it.

    `x` and `group` are those of `View`; empty: as the sweep suggests.
    """
    summary, section = write_tables(folder)
    histories = folder / "histories.csv"
    curves = read_histories(histories) if histories.exists() else None
    shutil.rmtree(folder / "figures", ignore_errors=True)  # else those of datasets that are gone would stay
    view = view_of(folder.name)
    if x or group:
        known = ["label", *(axis.rsplit("/")[-1].removeprefix(DATA) for axis in summary.axes)]
        if unknown := {x, group} - {"", *known}:
            raise UserError(f"this sweep does not vary {min(unknown)}: --x and --group take {' | '.join(known)}")
        view = replace(view, x=x or view.x, group=group or view.group, figure="lines")
    pictures = figures.draw(summary, view, folder.name, folder / "figures", curves)
    return replace(section, figures=sorted(pictures))


def source(rows: RunRows, sweep: str) -> str:
    """Where the numbers come from, in a sentence."""
    finished = rows.frame[rows.frame["status"] == "finished"]
    parts = [f"{len(finished)} runs of sweep {sweep} ({sweep}/rows.csv)"]
    for column, name in (("git_commit", "commit"), ("machine", "machine")):
        if column in finished:
            values = finished[column].dropna().astype(str).drop_duplicates()
            parts.append(f"{name}: {', '.join(values[:3])}{f' and {len(values) - 3} more' if len(values) > 3 else ''}")
    return "; ".join([*parts, "each run's command is in its row"])


if __name__ == "__main__":
    sys.exit(main())
