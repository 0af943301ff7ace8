"""A summary as figures, PNG and SVG, each with a caption."""

import textwrap
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from massdpo import store
from massdpo.report import plots
from massdpo.report.methods import GREY
from massdpo.report.summary import Summary
from massdpo.report.views import View, shares

BESIDE = 5  # panels side by side in a figure; more metrics make more figures
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a $ in a name is a $
}
SVG = {
    "svg.hashsalt": "massdpo",  # the same figure gives the same bytes
    "svg.fonttype": "none",  # text as text: a quarter of the size, and searchable
}


def draw(summary: Summary, view: View, sweep: str, folder: Path, histories: pd.DataFrame | None = None) -> list[Path]:
    """Write the figures of each dataset; returns the PNG files (an SVG stands beside each)."""
    written = []
    title = view.title.format(sweep=sweep)
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        for dataset, cells in summary.cells.groupby("dataset", sort=True):
            name, known = f"{sweep}_{dataset}", cells[cells["mean"].notna()]
            # That of two seeds is 12.7 standard errors long and would squeeze all else; the tables have it.
            known = known.assign(half=known["half"].mask(known["n"] < 3))
            if known.empty:
                continue
            prompts = f"{summary.sizes.get(str(dataset), '?')} test prompts."
            kind = {"dots": plots.dots, "lines": plots.lines, "front": plots.front, "curves": plots.dots}[view.figure]
            parts = [summary.metrics] if kind is plots.front else shares(summary.metrics, BESIDE)
            for number, metrics in enumerate(parts, start=1):
                figure, caption = kind(known, replace(summary, metrics=metrics), view)
                place = folder / (f"{name}_{number}" if len(parts) > 1 else name)
                about = f"{caption}. {_seeds(known['n'])}, {prompts}"
                written.append(_save(figure, place, f"{title}: {dataset}", about))
            compared = known.dropna(subset=["difference", "low", "high"])
            if view.differences and len(compared):
                figure, caption = plots.dots(compared, summary, view, differences=True)
                head = f"{title}, paired differences from random: {dataset}"
                about = f"{caption}. {_seeds(compared['pairs'])}, {prompts}"
                written.append(_save(figure, folder / f"{name}_differences", head, about))
            if view.figure == "curves" and histories is not None:
                part = histories[histories["dataset"] == dataset].dropna(axis="columns", how="all")
                if set(view.curves) & set(part):
                    figure, caption = plots.curves(part, view)
                    head = f"Over steps of the preference stage: {dataset}"
                    written.append(_save(figure, folder / f"{name}_curves", head, f"{caption}."))
    return written


def _seeds(counts: pd.Series) -> str:
    fewest, most = counts.min(), counts.max()
    return f"{f'{fewest} to ' if fewest < most else ''}{most} seed{'s' if most > 1 else ''}"


def _save(figure: Figure, path: Path, title: str, caption: str) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    lines = textwrap.wrap(caption, max(40, int(figure.get_figwidth() * 16)))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color=GREY)
    layout = figure.get_layout_engine()
    if layout is not None:  # once for both files
        layout.execute(figure)
        figure.set_layout_engine("none")
    save_pictures(figure, path)
    return path.with_name(f"{path.name}.png")


def save_pictures(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg, the same bytes every time, and close the figure."""
    for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        with store.replacing(path.with_name(f"{path.name}.{ending}")) as beside, plt.rc_context(SVG):  # type: ignore[arg-type]
            figure.savefig(beside, format=ending, metadata=metadata, dpi=120)
    plt.close(figure)
