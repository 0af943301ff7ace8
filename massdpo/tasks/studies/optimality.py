"""How far are greedy and swap from the optimum of the log-det, and how much of that could they prove?"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from massdpo.report.methods import COLOURS
from massdpo.selection import Random, logdet
from massdpo.tasks.studies.pools import clustered_pools, mass_design, value_of
from massdpo.tasks.studies.publish import legend_below, panels, publish, style, with_interval

LINES: dict[str, Any] = {"greedy": "-", "swap": "--"}


def optimality(
    out: Path,
    ks: Sequence[int] = (1, 2, 3, 4, 6),
    pools: Sequence[int] = (8, 12, 16, 20),
    ridges: Sequence[float] = (1.0, 0.01),
    prompts: int = 200,
) -> pd.DataFrame:
    """Compare the solvers on random pools of clustered features with random rewards, in the design of `selector=mass`.

    `ridges` are relative, like its default; `random` picks mark the other end. Returns the table.
    """
    axes, parts = ["ridge", "N", "k", "solver"], []
    for ridge, size in itertools.product(ridges, pools):
        pool = clustered_pools(prompts, size, seed=0)
        gram_BNN, mean_B = mass_design(pool)
        for k in (k for k in ks if k <= size):
            reached = {}
            for solver in ("exact", "swap", "greedy"):
                solved = logdet.select_logdet_gram(gram_BNN, k, ridge * mean_B, solver=solver)
                reached[solver] = solved.logdet_B, solved.certified_ratio_B
            value_B = value_of(gram_BNN, ridge * mean_B, Random(k)(pool))
            reached["random"] = value_B, torch.full_like(value_B, math.nan)
            for solver, (logdet_B, certified_B) in reached.items():
                columns = {"logdet": logdet_B, "true_ratio": logdet_B / reached["exact"][0]}
                case = {"ridge": ridge, "N": size, "k": k, "solver": solver}
                parts.append(pd.DataFrame({**columns, "certified_ratio": certified_B, **case}))
    frame = pd.concat(parts)
    table = with_interval(frame, axes, ["logdet", "true_ratio", "certified_ratio"])
    ratio = frame.groupby(axes, sort=False)["true_ratio"]
    table["worst_ratio"] = ratio.min().to_numpy()
    table["optimal_share"] = ratio.agg(lambda ratios: (ratios > 1 - 1e-9).mean()).to_numpy()
    figure, grid = panels(3 * len(ridges), columns=3)
    for place, ridge in enumerate(ridges):
        _draw(grid[3 * place : 3 * place + 3], table[table["ridge"] == ridge], f"ridge {ridge:g}")
    lines = [Line2D([], [], color="black", linestyle=line, label=name) for name, line in LINES.items()]
    legend_below(figure, grid[2], *lines)
    note = (
        f"Means over {prompts} random pools ± half-width of the 95% t interval. The ridge is in units of the mean "
        "diagonal (1 is the default), the log-det in nats above the empty set's. `true_ratio`: to the optimum, which "
        "`exact` finds; `worst_ratio`: its least value; `optimal_share`: of the pools, where it is 1; "
        "`certified_ratio`: what the upper bound proves without knowing the optimum."
    )
    publish(out, "optimality", table, table, figure, note)
    return table


def _draw(grid: Sequence[Axes], table: pd.DataFrame, title: str) -> None:
    """Log-det reached in the largest pools; the worst share of the optimum; the share of it proved by greedy."""
    sizes = sorted(table["N"].unique())
    looks = {"exact": ("-", "s", 9), "swap": ("--", "D", 6), "greedy": (":", "o", 3), "random": ("-", "v", 5)}
    for place, (solver, (line, marker, width)) in enumerate(looks.items()):
        part = table[(table["N"] == sizes[-1]) & (table["solver"] == solver)]
        look: dict[str, Any] = {"color": COLOURS[place], "marker": marker, "markersize": width, "linestyle": line}
        grid[0].errorbar(part["k"], part["logdet"], part["logdet ±"], label=solver, **look)
    grid[0].set(ylabel="log-det reached (nats)", title=f"{title}, N={sizes[-1]}")
    for place, size in enumerate(sizes):
        for solver, line in LINES.items():
            part = table[(table["N"] == size) & (table["solver"] == solver)]
            grid[1].plot(part["k"], part["worst_ratio"], line, **style(place))
        part = table[(table["N"] == size) & (table["solver"] == "greedy")]
        grid[2].errorbar(
            part["k"], part["certified_ratio"], part["certified_ratio ±"], label=f"N={size}", **style(place)
        )
    grid[1].set(ylabel="worst share of the optimum", title=title)
    grid[2].set(ylabel="share of the optimum proved", title=f"{title}, greedy")
    for panel in grid:
        panel.set_xlabel("negatives picked, k")
    grid[0].legend(fontsize=7)
