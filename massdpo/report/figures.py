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
            if known.empty:
                continue
            about = _about(known, summary.sizes.get(str(dataset), "?"))
            kind = {"dots": plots.dots, "lines": plots.lines, "front": plots.front, "curves": plots.dots}[view.figure]
            parts = [summary.metrics] if kind is plots.front else shares(summary.metrics, BESIDE)
            for number, metrics in enumerate(parts, start=1):
                figure = kind(known, replace(summary, metrics=metrics), view)
                place = folder / (f"{name}_{number}" if len(parts) > 1 else name)
                written.append(_save(figure, place, f"{title}: {dataset}", f"{CAPTIONS[kind]}{about}"))
            compared = known.dropna(subset=["difference", "low", "high"])
            if view.differences and len(compared):
                figure = plots.dots(compared, summary, view, differences=True)
                head = f"{title}, paired differences to random: {dataset}"
                written.append(_save(figure, folder / f"{name}_differences", head, f"{DIFFERENCES}{about}"))
            if view.figure == "curves" and histories is not None:
                curves = plots.curves(histories[histories["dataset"] == dataset], view)
                head = f"Over steps of the preference stage: {dataset}"
                written.append(_save(curves, folder / f"{name}_curves", head, CURVES))
    return written


CAPTIONS = {
    plots.dots: "Means; bars: 95% t intervals over seeds; dashed: random. ",
    plots.lines: "Means; bars: 95% t intervals over seeds; horizontal lines: one setting for all. ",
    plots.front: "Means; pale bars: 95% t intervals over seeds; dashed: joins the points that nothing beats in both. ",
}
DIFFERENCES = (
    "Method minus random; bars: 95% intervals, seeds and prompts as crossed random effects; dashed: no difference. "
)
CURVES = "Mean over seeds; band: lowest to highest seed."


def _about(cells: pd.DataFrame, prompts: str) -> str:
    seeds = sorted(cells["n"].unique())
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{span} seed{'s' if span != '1' else ''}, {prompts} test prompts."


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
        with store.replacing(path.with_name(f"{path.name}.{ending}")) as beside:
            figure.savefig(beside, format=ending, metadata=metadata, dpi=120)
    plt.close(figure)
