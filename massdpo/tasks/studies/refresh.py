"""What does it gain to select once, every epoch or every step, and what does it cost?"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from massdpo.report.methods import COLOURS, GREY
from massdpo.tasks.studies.publish import legend_below, panels, publish, with_interval

KINDS = ("once", "epoch", "step")
MEASURED = {
    "accuracy": "accuracy (test)",
    "ndcg@5": "NDCG@5 (test)",
    "margin": "mean margin (test; beta nats)",
    "chosen_logp_change": "change of the chosen log-prob (nats)",
    "select_seconds": "selection (s)",
    "train_seconds": "preference stage (s)",
}


def refresh(out: Path, run: Callable[[str, int], Mapping[str, Any]], seeds: Sequence[int]) -> pd.DataFrame:
    """Train each kind with each seed: `run(refresh, seed)` returns the run's metrics.

    Differences from `step` are paired by seed.
    """
    runs = [{**run(kind, seed), "refresh": kind, "seed": seed} for seed in seeds for kind in KINDS]
    frame = pd.DataFrame(runs)[["refresh", "seed", *MEASURED]]
    table = with_interval(frame, ["refresh"], MEASURED)
    values = frame.set_index(["refresh", "seed"])[list(MEASURED)]
    apart = pd.concat(
        {f"{kind} less step": values.loc[kind] - values.loc["step"] for kind in KINDS[:-1]}, names=["refresh"]
    )
    table = pd.concat([table, with_interval(apart.reset_index(), ["refresh"], MEASURED)])
    figure, grid = panels(len(MEASURED), columns=3)
    for panel, (name, label) in zip(grid, MEASURED.items(), strict=True):
        for kind in KINDS:
            values_S = frame[frame["refresh"] == kind][name]
            one_seed = "one seed" if kind == KINDS[0] else None
            panel.plot([kind] * len(values_S), values_S, "o", color=GREY, alpha=0.4, markersize=3, label=one_seed)
        means = table[table["refresh"].isin(KINDS)]
        line: dict[str, Any] = {"fmt": "D", "color": COLOURS[0], "capsize": 3, "label": "mean, 95% interval"}
        panel.errorbar(means["refresh"], means[name], means[f"{name} ±"], **line)
        panel.set(xlabel="negatives selected again", ylabel=label)
        panel.margins(x=0.2)
    legend_below(figure, grid[0])
    labels = "; ".join(f"`{name}`: {label}" for name, label in MEASURED.items())
    note = (
        f"Mean over {len(seeds)} training seeds ± half-width of the 95% t interval; differences are paired by seed. "
        f"{labels}."
    )
    publish(out, "refresh", frame, table, figure, note)
    return frame
