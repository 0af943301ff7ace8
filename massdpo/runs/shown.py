"""What a finished run shows: the table of its metrics, its curves, what to try next."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from massdpo.console import summary_table
from massdpo.evaluation.metrics import GENERATION, METRICS, standard_errors
from massdpo.store import replacing

SHOWN = tuple(metric.name for metric in METRICS.values() if metric.summary)  # in the table at the end of a run
GENERATED = tuple(metric.name for metric in GENERATION)  # below it, with trainer.generate
COMPARED = ("mass", "random", "hardest", "full")  # with every run
OF_ONE_RUN = ("selector", "method", "seed", "name", "sweep", "force", "task", "in")  # options that a comparison sets


def show(folder: Path, metrics: dict[str, Any], sync: str | None) -> None:
    """The table at the end: the SFT start and the trained policy, where the files are, and what to try next."""
    with open(folder / "predictions.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    errors = standard_errors({name: [line[name] for line in lines] for name in lines[0]})
    rows = []
    for name in SHOWN:
        before = metrics.get(f"sft/{name}", 0.0)  # rewards, margins and changes are 0 at the start, by definition
        row = {"test metric": name, "SFT start": _number(before), "trained": _number(metrics[name])}
        rows.append(row | {"± s.e.": f"{errors[name]:.3f}" if name in errors else ""})
    summary_table("SFT start against the trained policy, test split", rows)
    if "hr@1" in metrics:
        shares = [f"{name} {metrics[name]:.3f}" for name in GENERATED]
        print(f"greedy decoding: {', '.join(shares)}")
    seconds = [f"{metrics[f'{name}_seconds']:.0f} s" for name in ("sft", "train", "select")]
    print(f"time:  SFT {seconds[0]}, preference stage {seconds[1]}, of which selection {seconds[2]}")
    known = ("metrics.json", "history.csv", "predictions.jsonl", "picks.jsonl", "history.png", "policy")
    there = [f"{name}/" if name == "policy" else name for name in known if (folder / name).exists()]
    print(f"files: {os.path.relpath(folder)}  ({', '.join(there)})")
    if sync:
        print(f"W&B:   {sync}")
    print(f"next:  {comparison(metrics['command'])}   # compare selectors over seeds")


def comparison(command: str) -> str:
    """The command that compares a run's selector with others over seeds, all its other options kept."""
    given = [word for word in shlex.split(command)[2:] if "=" in word]
    own = [word.partition("=")[2] for word in given if word.startswith("selector=")]
    selectors = dict.fromkeys([*own, *COMPARED])
    kept = [word for word in given if word.split("=")[0] not in OF_ONE_RUN]
    return shlex.join(["python", "run.py", "-m", f"selector={','.join(selectors)}", "seed=0,1,2", *kept])


def _number(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) and value < 0 else f"{value:.3f}"


PANELS: dict[str, tuple[str, dict[str, str]]] = {  # title -> stage, column of history.csv -> what the legend says
    "SFT: loss (nats)": ("sft", {"loss": "training"}),
    "SFT: validation": ("sft", {"val/accuracy": "accuracy", "val/mrr": "MRR"}),
    "preferences: log-prob (nats)": ("preference", {"chosen_logp": "chosen", "rejected_logp": "rejected"}),
    "preferences: loss": ("preference", {"loss": "training"}),
    "preferences: validation": ("preference", {"val/accuracy": "accuracy", "val/reward_accuracy": "reward accuracy"}),
    "preferences: margin (β·nats)": (
        "preference",
        {"margin": "mean", "margin_max": "max", "val/margin": "mean, validation", "val/margin_max": "max, validation"},
    ),
}


def draw_history(history: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Both stages of a run over their steps, as a PNG: training as lines, validation as points."""
    from matplotlib.figure import Figure  # takes half a second to import; no global state

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    for axes, (head, (stage, columns)) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for name, said in columns.items():
            points = [(row["step"], row[name]) for row in history if row["stage"] == stage and name in row]
            looks = (
                {"marker": "o", "linestyle": "--", "markersize": 4} if name.startswith("val/") else {"linewidth": 1.2}
            )
            colour = f"C{list(columns.values()).index(said.removesuffix(', validation'))}"
            axes.plot([step for step, _ in points], [value for _, value in points], label=said, color=colour, **looks)
        axes.set_title(head, loc="left", fontsize=9)
        axes.set_xlabel("optimiser step", fontsize=8)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(color="#e3e3e3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(file) as beside:
        figure.savefig(beside, format="png", dpi=120)
