"""What does it gain to select once, every epoch or every step, and what does it cost?"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from massdpo.report.methods import COLOURS, GREY
from massdpo.tasks.studies.publish import panels, publish, with_interval

KINDS = ("once", "epoch", "step")


def refresh(
    out: Path, run: Callable[[str, int], Mapping[str, float]], seeds: Sequence[int], labels: Mapping[str, str]
) -> pd.DataFrame:
    """Train each kind with each seed: `run(refresh, seed)` returns numbers by name, of which `labels` are shown.

    Differences from `step` are paired by seed.
    """
    frame = pd.DataFrame([{"refresh": kind, "seed": seed, **run(kind, seed)} for seed in seeds for kind in KINDS])
    measured = list(labels)
    table = with_interval(frame, ["refresh"], measured)
    values = frame.set_index(["refresh", "seed"])[measured]
    apart = pd.concat(
        {f"{kind} less step": values.loc[kind] - values.loc["step"] for kind in KINDS[:-1]}, names=["refresh"]
    )
    table = pd.concat([table, with_interval(apart.reset_index(), ["refresh"], measured)])
    figure, grid = panels(len(measured), columns=3)
    for panel, name in zip(grid, measured, strict=True):
        for kind in KINDS:
            values_S = frame[frame["refresh"] == kind][name]
            label = "one seed" if kind == KINDS[0] else None
            panel.plot([kind] * len(values_S), values_S, "o", color=GREY, alpha=0.4, markersize=3, label=label)
        means = table[table["refresh"].isin(KINDS)]
        line: dict[str, Any] = {"fmt": "D", "color": COLOURS[0], "capsize": 3, "label": "mean, 95% interval"}
        panel.errorbar(means["refresh"], means[name], means[f"{name} ±"], **line)
        panel.set(xlabel="negatives selected again", ylabel=labels[name])
        panel.margins(x=0.2)
    handles = grid[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)
    note = (
        f"Mean over {len(seeds)} training seeds ± half-width of the 95% t interval; differences are paired by seed. "
        + "; ".join(f"`{name}`: {label}" for name, label in labels.items())
        + "."
    )
    publish(out, "refresh", frame, table, figure, note)
    return frame
